"""DoRA against peft: outputs, gradients, five steps; its norm against float64; 4-bit bases; merge, cache, folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.errors import ModelError
from llmrecipe.methods.inject import all_ports
from llmrecipe.methods.memory.nf4 import Nf4
from llmrecipe.methods.quantized import dense_weight
from llmrecipe.methods.reparameterized import dora
from llmrecipe.methods.reparameterized.dora import Dora, norm_of_sum
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.methods.stack import Stack
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from llmrecipe.training.opened import open_model
from tests.export.saved_runs import base_folder, fill, saved_run
from tests.tiny import tiny_model

IDS = torch.tensor([[5, 9, 3, 60, 7, 7, 2]])


def adapted(family: str = "llama", below: tuple[Any, ...] = (), **options: Any) -> tuple[nn.Module, Stack]:
    model = tiny_model(family, **({"attention_bias": True} if family == "llama" else {}))
    stack = Stack([*below, Dora(name="dora", **{"r": 4, "alpha": 6.0, **options})])
    stack.attach(model)
    return model, stack


def ports(model: nn.Module) -> dict[str, Any]:
    return {path: port for path, _, _, port in all_ports(model)}


def loss_of(model: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(model(input_ids=IDS).logits[0, :-1], IDS[0, 1:])


CASES = [
    ("llama", "attn.q|v + mlp.down", ["q_proj", "v_proj", "down_proj"]),
    ("gpt2", "attn.qkv", ["c_attn"]),
    ("llama", "embed", ["embed_tokens"]),
]


def twin_of(model: nn.Module, family: str, targets: list[str], **config: Any) -> tuple[nn.Module, dict[str, Any]]:
    from peft import LoraConfig, get_peft_model

    base = tiny_model(family, **({"attention_bias": True} if family == "llama" else {}))
    fan = {"fan_in_fan_out": True} if family == "gpt2" else {}
    twin = get_peft_model(base, LoraConfig(target_modules=targets, r=4, lora_alpha=6, use_dora=True, **fan, **config))
    ours = ports(model)
    theirs = {n: m for n, m in twin.base_model.model.named_modules() if hasattr(m, "lora_A") and n in ours}
    assert len(theirs) == len(ours)
    for path, module in theirs.items():
        A, B, m = parts_of(module)
        A.data.copy_(ours[path].A.data)
        B.data.copy_(ours[path].B.data)
        m.data.copy_(ours[path].magnitude.data)
    return twin, theirs


def parts_of(module: nn.Module) -> tuple[Any, Any, Any]:
    m = module.lora_magnitude_vector["default"].weight
    if "default" in module.lora_embedding_A:
        return module.lora_embedding_A["default"], module.lora_embedding_B["default"], m
    return module.lora_A["default"].weight, module.lora_B["default"].weight, m


@pytest.mark.parametrize(("family", "target", "targets"), CASES)
def test_outputs_gradients_and_five_steps_equal_peft(family: str, target: str, targets: list[str]) -> None:
    """Biased linear layers, Conv1D and embeddings."""
    model, stack = adapted(family, target=target)
    fill(model)
    twin, theirs = twin_of(model, family, targets)
    pair = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0) for m in (model, twin)]
    for step in range(5):
        stack.before_step(model, step)
        for m in (model, twin):
            loss_of(m).backward()
        torch.testing.assert_close(model(input_ids=IDS).logits, twin(input_ids=IDS).logits, atol=2e-5, rtol=1e-5)
        for path, port in ports(model).items():
            for own, other in zip((port.A, port.B, port.magnitude), parts_of(theirs[path]), strict=True):
                torch.testing.assert_close(own.grad, other.grad, atol=2e-6, rtol=1e-3)
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()
        stack.after_step(model, step)


def test_with_dropout_the_rescaled_part_reads_the_dropped_input_like_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted(target="attn.q", dropout=0.5)
    fill(model)
    twin, _ = twin_of(model, "llama", ["q_proj"], lora_dropout=0.5)

    def masked(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        """The same entries dropped for everybody."""
        if not training or not p:
            return x
        return x * (torch.arange(x.shape[-1]) % 2 == 0) / (1 - p)

    monkeypatch.setattr(torch.nn.functional, "dropout", masked)
    model.train()
    twin.train()
    torch.testing.assert_close(model(input_ids=IDS).logits, twin(input_ids=IDS).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["attn.q|v + mlp.down", "embed"])
@pytest.mark.parametrize("below", [(), (Nf4(name="nf4"),)])
def test_step_zero_is_the_base_bit_for_bit_quantized_or_not(target: str, below: tuple[Any, ...]) -> None:
    plain = tiny_model(attention_bias=True)
    Stack(list(below)).attach(plain)
    model, _ = adapted(below=below, target=target)
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_the_norm_equals_float64_and_survives_cancellation() -> None:
    torch.manual_seed(0)
    W, A, B = torch.randn(40, 64) * 0.02, torch.randn(8, 64) * 0.1, torch.randn(40, 8) * 0.05
    wanted = (W.double() + 2.0 * B.double() @ A.double()).norm(dim=1)
    got = norm_of_sum(W.square().sum(1), W @ A.t(), A, B, 2.0)
    assert ((got.double() - wanted).abs() / wanted).max() < 1e-6
    gone = norm_of_sum(torch.ones(1), torch.tensor([[-1.0]]), torch.ones(1, 1), torch.ones(1, 1), 1.0)
    assert gone.isnan().all()
    model, _ = adapted(target="layers.0.mlp.up")
    port = next(iter(ports(model).values()))
    weight = model.model.layers[0].mlp.up_proj.weight
    # Row 3 of V is a thousandth of row 3 of W.
    port.A.data[0] = weight[3] / port.scale
    port.B.data[3] = torch.tensor([-0.999, 0.0, 0.0, 0.0])
    norm = port.magnitude / port.gain(lambda: weight @ port.A.t())
    wanted = (weight.double() + port.scale * port.B.double() @ port.A.double()).norm(dim=1)
    assert ((norm.double() - wanted).abs() / wanted).max() < 1e-3


def test_on_four_bits_the_forward_is_the_formula_on_the_dequantized_weight_and_never_asks_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = adapted(below=(Nf4(name="nf4"),), target="layers.0.attn.q")
    fill(model)
    layer = model.model.layers[0].self_attn.q_proj
    port, W = layer.dora, dense_weight(layer).float()
    monkeypatch.setattr(dora, "dense_weight", lambda *_: pytest.fail("dequantized in the forward pass"))
    x = torch.randn(3, 32)
    V = W + port.scale * port.B @ port.A
    wanted = x @ (port.magnitude / V.norm(dim=1))[:, None].mul(V).t() + layer.bias
    torch.testing.assert_close(layer(x), wanted, atol=1e-4, rtol=1e-4)


def test_the_norm_is_computed_once_a_step_and_never_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(dora, "norm_of_sum", lambda *a: calls.append(1) or norm_of_sum(*a))
    model, stack = adapted(target="layers.0.attn.q")
    fill(model)
    for _ in range(3):
        model(input_ids=IDS)
    assert len(calls) == 1
    port = next(iter(ports(model).values()))
    with torch.no_grad():
        port.B.add_(0.1)
    first = model(input_ids=IDS).logits
    assert len(calls) == 2
    # An optimizer that writes through raw memory changes no version; the hooks of the loop drop the cache.
    port.B.data.add_(0.1)
    stack.after_step(model, 0)
    assert not torch.equal(model(input_ids=IDS).logits, first)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("family", "target"), [("llama", "all-linear"), ("gpt2", "attn.q|v"), ("gpt_neox", "attn.q"), ("llama", "embed")]
)
def test_merging_gives_the_same_logits(family: str, target: str) -> None:
    model, stack = adapted(family, target=target)
    fill(model)
    wanted = model(input_ids=IDS).logits
    stack.wrappers[0].merge(model)
    assert not list(all_ports(model))
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=3e-5, rtol=1e-4)


def test_magnitudes_do_not_decay_and_experts_are_refused() -> None:
    model, stack = adapted(target="attn.q")
    (group,) = stack.groups(model)
    assert group.weight_decay == 0.0
    assert group.names == {n for n, _ in model.named_parameters() if n.endswith("magnitude")}
    assert len(group.names) == 2
    wanted = 2 * (4 * (32 + 32) + 32)
    assert (
        sum(p.numel() for p in model.parameters() if p.requires_grad) == wanted == stack.wrappers[0].memory(model)["trainable"]
    )
    with pytest.raises(ModelError, match="not a linear layer or embedding"):
        adapted("mixtral", target="experts")


def test_the_exact_gradient_is_there_for_study() -> None:
    """Without detaching, A's gradient is that of float64 autograd through the norm."""
    model, _ = adapted(target="layers.0.attn.q", detach_norm=False)
    fill(model)
    layer = model.model.layers[0].self_attn.q_proj
    port = layer.dora
    x = torch.randn(3, 32)
    layer(x).square().sum().backward()
    A = port.A.detach().double().requires_grad_()
    V = layer.weight.detach().double() + port.scale * port.B.detach().double() @ A
    y = x.double() @ (port.magnitude.detach().double()[:, None] * V / V.norm(dim=1, keepdim=True)).t() + layer.bias.double()
    y.square().sum().backward()
    torch.testing.assert_close(port.A.grad.double(), A.grad, atol=1e-3, rtol=1e-4)


FOLDERS = [("llama", "attn.q|v"), ("gpt2", "attn.qkv"), ("gpt2", "attn.q"), ("llama", "embed + mlp.up")]


@pytest.mark.parametrize(("family", "target"), FOLDERS)
def test_peft_loads_the_folder_and_so_do_we(tmp_path: Path, family: str, target: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from llmrecipe.export.peft import export_peft

    base = base_folder(tmp_path, family)
    model = saved_run(tmp_path / "run", base, Dora(name="dora", r=4, alpha=6.0, target=target))
    wanted = model(input_ids=IDS).logits
    folder = export_peft(tmp_path / "run").path
    twin = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    torch.testing.assert_close(twin(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)
    again = open_model(ModelSection(path=str(folder)), TokenizerSection()).model
    torch.testing.assert_close(again(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)


def test_a_chain_with_lora_merges_in_the_order_that_is_exact(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from llmrecipe.export.merged import export_merged
    from llmrecipe.export.peft import export_peft

    saved_run(tmp_path / "first", base_folder(tmp_path), Lora(name="lora"))
    model = saved_run(tmp_path / "second", tmp_path / "first", Dora(name="dora"), seed=8)
    wanted = model(input_ids=IDS).logits
    plain = AutoModelForCausalLM.from_pretrained(export_merged(tmp_path / "second").path).eval()
    torch.testing.assert_close(plain(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(ModelError, match="export merged instead"):
        export_peft(tmp_path / "second")
