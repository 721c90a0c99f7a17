"""DoRA against peft: outputs, gradients, five steps; its norm against float64; 4-bit bases; merge, cache, folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.core.errors import ModelError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._engines import dora_norm
from llmrecipe.methods._engines.quantized import dense_weight
from llmrecipe.methods.memory.nf4 import Nf4
from llmrecipe.methods.reparameterized import dora
from llmrecipe.methods.reparameterized.dora import Dora, Magnitude, norm_of_sum
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from llmrecipe.runs.open_model import open_model
from tests.interop.saved_runs import base_folder, fill, saved_run
from tests.methods.twins import IDS, next_token_loss, side_by_side
from tests.tiny import tiny_model


def adapted(family: str = "llama", below: tuple[Any, ...] = (), **options: Any) -> tuple[nn.Module, Stack]:
    model = tiny_model(family, **({"attention_bias": True} if family == "llama" else {}))
    stack = Stack([*below, Dora(name="dora", **{"r": 4, "alpha": 6.0, **options})])
    stack.attach(model)
    return model, stack


def hooks(model: nn.Module) -> dict[str, Any]:
    return {path: hook for path, _, _, hook in all_hooks(model)}


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
    ours = hooks(model)
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


@pytest.mark.parity("dora", "PEFT LoraConfig(use_dora)")
@pytest.mark.parametrize(("family", "target", "targets"), CASES)
@pytest.mark.parametrize("moved", [0.02, 0.2])
def test_outputs_gradients_and_five_steps_equal_peft(family: str, target: str, targets: list[str], moved: float) -> None:
    """Biased linear layers, Conv1D and embeddings; far from the start some gains are next to nothing."""
    model, stack = adapted(family, target=target)
    fill(model, scale=moved)
    twin, theirs = twin_of(model, family, targets)
    for step, losses in enumerate(side_by_side((model, twin))):
        torch.testing.assert_close(*losses, atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(model(input_ids=IDS).logits, twin(input_ids=IDS).logits, atol=2e-5, rtol=1e-5)
        for path, hook in hooks(model).items():
            for own, other in zip((hook.A, hook.B, hook.magnitude), parts_of(theirs[path]), strict=True):
                torch.testing.assert_close(own.grad, other.grad, atol=2e-6, rtol=1e-3)
        stack.after_step(model, step)


@pytest.mark.parity("dora", "PEFT LoraConfig(use_dora)")
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
    torch.testing.assert_close(got.double(), wanted, atol=0, rtol=1e-6)
    gone = norm_of_sum(torch.ones(1), torch.tensor([[-1.0]]), torch.ones(1, 1), torch.ones(1, 1), 1.0)
    assert gone.isnan().all()
    model, _ = adapted(target="layers.0.mlp.up")
    hook = next(iter(hooks(model).values()))
    weight = model.model.layers[0].mlp.up_proj.weight
    # Row 3 of V is a thousandth of row 3 of W.
    hook.A.data[0] = weight[3] / hook.scale
    hook.B.data[3] = torch.tensor([-0.999, 0.0, 0.0, 0.0])
    norm = hook.magnitude / hook.gain(lambda: weight @ hook.A.t())
    wanted = (weight.double() + hook.scale * hook.B.double() @ hook.A.double()).norm(dim=1)
    torch.testing.assert_close(norm.double(), wanted, atol=0, rtol=1e-3)


def test_on_four_bits_the_forward_is_the_formula_on_the_dequantized_weight_and_never_asks_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = adapted(below=(Nf4(name="nf4"),), target="layers.0.attn.q")
    fill(model)
    layer = model.model.layers[0].self_attn.q_proj
    hook, W = layer.dora, dense_weight(layer).float()
    monkeypatch.setattr(dora_norm, "weight_below", lambda *_: pytest.fail("dequantized in the forward pass"))
    x = torch.randn(3, 32)
    V = W + hook.scale * hook.B @ hook.A
    wanted = x @ (hook.magnitude / V.norm(dim=1))[:, None].mul(V).t() + layer.bias
    torch.testing.assert_close(layer(x), wanted, atol=1e-4, rtol=1e-4)


def test_the_norm_is_computed_once_a_step_and_never_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(dora, "norm_of_sum", lambda *a: calls.append(1) or norm_of_sum(*a))
    model, stack = adapted(target="layers.0.attn.q")
    fill(model)
    for _ in range(3):
        model(input_ids=IDS)
    assert len(calls) == 1
    hook = next(iter(hooks(model).values()))
    with torch.no_grad():
        hook.B.add_(0.1)
    first = model(input_ids=IDS).logits
    assert len(calls) == 2
    # An optimizer that writes through raw memory changes no version; the hooks of the loop drop the cache.
    hook.B.data.add_(0.1)
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
    assert not list(all_hooks(model))
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


@pytest.mark.parity("dora", "formula, float64")
@pytest.mark.parametrize(("family", "sites"), [("llama", "attn.v + mlp.up"), ("gpt2", "attn.k|v + mlp.up"), ("llama", "embed")])
def test_sites_of_magnitude_only_equal_the_formula_in_float64_forward_and_backward(family: str, sites: str) -> None:
    """y = b + m / ||W|| (W x) and dL/dm_i = sum over tokens of dL/dy_i (W x)_i / ||W_i||."""
    model, stack = adapted(family, target="attn.q", magnitude_only=f"{sites} + attn.q")
    fill(model, scale=0.5)
    found = hooks(model)
    assert all(isinstance(hook, Magnitude) for hook in found.values())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{path}.{n}" for path, n in _names(model)}
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(path: str, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        y.retain_grad()
        seen[path] = [inputs[0], y]

    handles = [model.get_submodule(path).register_forward_hook(lambda _, x, y, path=path: keep(path, x, y)) for path in found]
    next_token_loss(model).backward()
    for handle in handles:
        handle.remove()
    for path, module, _, hook in all_hooks(model):
        x, y = seen[path]
        full = module.weight.detach().double()
        full = full.t() if family == "gpt2" or hook.embeds else full
        rows = full if hook.rows is None else full[hook.rows]
        wx = full.t()[x] if hook.embeds else x.double() @ full.t()
        wx = wx if hook.rows is None else wx[..., hook.rows]
        bias = getattr(module, "bias", None)
        bias = torch.zeros(len(full), dtype=torch.float64) if bias is None else bias.double()
        part = slice(None) if hook.rows is None else hook.rows
        wanted = hook.magnitude.double() / rows.norm(dim=1) * wx + bias[part]
        torch.testing.assert_close(y.double()[..., part], wanted, atol=1e-4, rtol=1e-5)
        gradient = (y.grad.double()[..., part] * wx / rows.norm(dim=1)).flatten(0, -2).sum(0)
        torch.testing.assert_close(hook.magnitude.grad.double(), gradient, atol=1e-5, rtol=1e-4)
    before = model(input_ids=IDS).logits
    stack.wrappers[0].merge(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, before, atol=1e-4, rtol=1e-4)


def _names(model: nn.Module) -> list[tuple[str, str]]:
    return [(path, f"{name}.magnitude") for path, _, name, _ in all_hooks(model)]


@pytest.mark.parametrize("below", [(), (Nf4(name="nf4"),)])
def test_magnitudes_alone_start_at_the_base_bit_for_bit_and_do_not_decay(below: tuple[Any, ...]) -> None:
    base, _ = adapted(below=below, target="attn.q")
    model, stack = adapted(below=below, target="attn.q", magnitude_only="attn.v + mlp.up")
    assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)
    names = {f"{path}.{name}" for path, name in _names(model)}
    (group,) = stack.groups(model)
    assert group.names == names and group.weight_decay == 0.0
    # 2 layers: q has a pair of rank 4 on 32 x 32 and 32 magnitudes; v and up have 16 and 48 magnitudes alone.
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (4 * (32 + 32) + 32 + 16 + 48)


def test_the_exact_gradient_is_there_for_study() -> None:
    """Without detaching, A's gradient is that of float64 autograd through the norm."""
    model, _ = adapted(target="layers.0.attn.q", detach_norm=False)
    fill(model)
    layer = model.model.layers[0].self_attn.q_proj
    hook = layer.dora
    x = torch.randn(3, 32)
    layer(x).square().sum().backward()
    A = hook.A.detach().double().requires_grad_()
    V = layer.weight.detach().double() + hook.scale * hook.B.detach().double() @ A
    y = x.double() @ (hook.magnitude.detach().double()[:, None] * V / V.norm(dim=1, keepdim=True)).t() + layer.bias.double()
    y.square().sum().backward()
    torch.testing.assert_close(hook.A.grad.double(), A.grad, atol=1e-3, rtol=1e-4)


FOLDERS = [("llama", "attn.q|v"), ("gpt2", "attn.qkv"), ("gpt2", "attn.q"), ("llama", "embed + mlp.up")]


@pytest.mark.parametrize(("family", "target"), FOLDERS)
def test_peft_loads_the_folder_and_so_do_we(tmp_path: Path, family: str, target: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from llmrecipe.interop.peft.exporter import export_peft

    base = base_folder(tmp_path, family)
    model = saved_run(tmp_path / "run", base, Dora(name="dora", r=4, alpha=6.0, target=target))
    wanted = model(input_ids=IDS).logits
    folder = export_peft(tmp_path / "run").path
    twin = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    torch.testing.assert_close(twin(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)
    again = open_model(ModelSection(path=str(folder)), TokenizerSection()).model
    torch.testing.assert_close(again(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)


def test_a_folder_with_magnitudes_alone_is_the_same_function_in_peft_and_back(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from llmrecipe.interop.peft.exporter import export_peft

    base = base_folder(tmp_path)
    wrapper = Dora(name="dora", target="attn.q", r=4, magnitude_only="attn.v + mlp.down + embed")
    wanted = saved_run(tmp_path / "run", base, wrapper)(input_ids=IDS).logits
    folder = export_peft(tmp_path / "run").path
    twin = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    torch.testing.assert_close(twin(input_ids=IDS).logits, wanted, atol=2e-4, rtol=1e-4)
    back = open_model(ModelSection(path=str(folder)), TokenizerSection()).model
    torch.testing.assert_close(back(input_ids=IDS).logits, wanted, atol=2e-4, rtol=1e-4)


def test_a_chain_with_lora_merges_in_the_order_that_is_exact(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from llmrecipe.interop.merged import export_merged
    from llmrecipe.interop.peft.exporter import export_peft

    saved_run(tmp_path / "first", base_folder(tmp_path), Lora(name="lora"))
    model = saved_run(tmp_path / "second", tmp_path / "first", Dora(name="dora"), seed=8)
    wanted = model(input_ids=IDS).logits
    plain = AutoModelForCausalLM.from_pretrained(export_merged(tmp_path / "second").path).eval()
    torch.testing.assert_close(plain(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(ModelError, match="export merged instead"):
        export_peft(tmp_path / "second")
