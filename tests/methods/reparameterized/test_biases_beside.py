"""`bias` of LoRA, DoRA and AdaLoRA: the base's own biases trained beside them, against peft; merged, written, read, refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.core import registry
from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.interop.peft.exporter import export_peft
from llmrecipe.methods._base.method import Probe
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._engines.biases import masters
from llmrecipe.methods._engines.low_rank import LowRank
from llmrecipe.methods.reparameterized.adalora import Adalora
from llmrecipe.methods.selective.bitfit import Bitfit
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from llmrecipe.runs.open_model import open_model
from tests.interop.saved_runs import base_folder, fill, saved_run
from tests.methods.twins import IDS, momentum, side_by_side
from tests.tiny import tiny_model

KINDS = ["dora", "adalora"]
STEPS: dict[str, Any] = {"init_r": 4, "target_r": 2, "total_step": 100}


def wrapper(kind: str, **options: Any) -> Any:
    if kind != "adalora":
        return registry.load_class("stack", kind)(name=kind, **{"r": 4, "alpha": 6.0, **options})
    return Adalora(name="adalora", **{"alpha": 6.0, **STEPS, **options})


def put(model: nn.Module, *wrappers: Any) -> Stack:
    stack = Stack(list(wrappers))
    stack.attach(model)
    return stack


def peft_config(kind: str, targets: list[str], **options: Any) -> Any:
    from peft import AdaLoraConfig, LoraConfig

    if kind != "adalora":
        return LoraConfig(target_modules=targets, r=4, lora_alpha=6, use_dora=kind == "dora", **options)
    return AdaLoraConfig(target_modules=targets, lora_alpha=6, **{**STEPS, **options})


CASES = [
    ("gpt2", "attn.qkv", ["c_attn"], "all", {}),
    ("gpt2", "attn.qkv + mlp.up", ["c_attn", "c_fc"], "lora_only", {}),
    ("bert", "attn.q|v", ["query", "value"], "all", {}),
    ("bert", "attn.q|v", ["query", "value"], "lora_only", {}),
    ("llama", "attn.q|v", ["q_proj", "v_proj"], "lora_only", {"attention_bias": True}),
    ("llama", "attn.q", ["q_proj"], "all", {"attention_bias": True}),
]


@pytest.mark.parametrize("kind", [
    pytest.param("lora", marks=pytest.mark.parity("lora", "PEFT LoraConfig(bias)")),
    pytest.param("dora", marks=pytest.mark.parity("dora", "PEFT LoraConfig(use_dora, bias)")),
    pytest.param("adalora", marks=pytest.mark.parity("adalora", "PEFT AdaLoraConfig(bias)")),
])  # fmt: skip
@pytest.mark.parametrize(("family", "target", "targets", "bias", "more"), CASES)
def test_losses_gradients_and_what_five_steps_learn_equal_peft(
    kind: str, family: str, target: str, targets: list[str], bias: str, more: dict[str, Any]
) -> None:
    from peft import get_peft_model

    model = tiny_model(family, **more)
    start = copy.deepcopy(dict(model.named_parameters()))
    put(model, wrapper(kind, target=target, bias=bias))
    twin = get_peft_model(tiny_model(family, **more), peft_config(kind, targets, bias=bias, fan_in_fan_out=family == "gpt2"))
    twin.train(model.training)
    ours = {path: hook for path, _, _, hook in all_hooks(model) if isinstance(hook, LowRank)}
    theirs = {n: m for n, m in twin.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert ours.keys() == theirs.keys()
    for path, module in theirs.items():
        for own, other in zip(factors(kind, ours[path]), peft_factors(kind, module), strict=True):
            other.data = own.data.clone()
    wanted = {
        n.replace(".base_layer", "").removesuffix(".bias"): p
        for n, p in twin.base_model.model.named_parameters()
        if p.requires_grad and n.endswith(".bias")
    }
    # BERT's prediction head has one bias under two names: peft lists the first, the master stands where it is applied.
    wanted = {"cls.predictions.decoder" if path == "cls.predictions" else path: p for path, p in wanted.items()}
    found = {path: hook.bias for path, _, _, hook in masters(model)}
    assert found.keys() == wanted.keys() and found
    for losses in side_by_side((model, twin), make=momentum):
        torch.testing.assert_close(*losses, atol=2e-6, rtol=2e-6)
        for path, p in wanted.items():
            torch.testing.assert_close(found[path].grad, p.grad, atol=2e-6, rtol=1e-4, msg=path)
    for path, p in wanted.items():
        torch.testing.assert_close(found[path], p, atol=1e-5, rtol=1e-4, msg=path)
    for path, module in theirs.items():
        for own, other in zip(factors(kind, ours[path]), peft_factors(kind, module), strict=True):
            torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4, msg=path)
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in start.items())


def factors(kind: str, hook: Any) -> list[nn.Parameter]:
    third = {"lora": [], "dora": ["magnitude"], "adalora": ["E"]}[kind]
    return [hook.A, hook.B, *(getattr(hook, name) for name in third)]


def peft_factors(kind: str, module: Any) -> list[nn.Parameter]:
    if kind == "adalora":
        return [module.lora_A["default"], module.lora_B["default"], module.lora_E["default"]]
    pair = [module.lora_A["default"].weight, module.lora_B["default"].weight]
    return pair if kind == "lora" else [*pair, module.lora_magnitude_vector["default"].weight]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_step_zero_and_the_switched_off_method_are_the_base_bit_for_bit_and_merging_keeps_the_logits(
    kind: str, bias: str
) -> None:
    base = tiny_model("gpt2")(input_ids=IDS).logits
    model = tiny_model("gpt2")
    stack = put(model, wrapper(kind, target="attn.q|v + mlp.down", bias=bias))
    assert torch.equal(model(input_ids=IDS).logits, base) and stack.reference_is_off()
    fill(model, scale=0.05)
    for _, _, _, hook in all_hooks(model):
        hook.cached = None  # `fill` writes through raw memory
    unmerged = model(input_ids=IDS).logits
    with activate(Context(role="reference")):
        assert torch.equal(model(input_ids=IDS).logits, base)
    learned = {
        path: hook.weight(module.bias.detach()).detach() for path, module, _, hook in masters(model) if hook.rows is None
    }
    stack.wrappers[0].merge(model)
    assert not list(all_hooks(model)) and learned
    for path, value in learned.items():
        assert torch.equal(model.get_submodule(path).bias, value), path
    torch.testing.assert_close(model(input_ids=IDS).logits, unmerged, atol=5e-5, rtol=1e-4)


def test_biases_are_counted_and_no_magnitude_is_looked_for_beside_them() -> None:
    model = tiny_model("gpt2")
    stack = put(model, wrapper("dora", target="attn.q", magnitude_only="attn.v", bias="lora_only"))
    # Two layers: A, B and m of q; m of v; the q and v thirds of the fused bias.
    assert stack.wrappers[0].memory(model)["trainable"] == 2 * (4 * (32 + 32) + 32 + 32 + 2 * 32)
    (group,) = stack.groups(model)
    assert len(group.names) == 4 and group.names <= dict(model.named_parameters()).keys()
    model = tiny_model("gpt2")
    stack = put(model, wrapper("adalora", target="attn.q", bias="lora_only"))
    facts = stack.wrappers[0].memory(model)
    assert facts["trainable"] == 2 * (4 * (32 + 32 + 1) + 32) and facts["state_bytes"] == 8 * 2 * 4 * (32 + 32 + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_biases_or_shares_them_is_refused(kind: str) -> None:
    for bias, words in (("all", "this model has"), ("lora_only", "'attn.q' has")):
        with pytest.raises(ModelError, match=rf"stack.{kind}.bias: {words} no biases to train; leave it at none"):
            put(tiny_model(), wrapper(kind, target="attn.q", bias=bias))
    with pytest.raises(ModelError, match=rf"stack.bitfit: stack.{kind} trains the same biases; let one of the two train them"):
        put(tiny_model("gpt2"), wrapper(kind, target="attn.q", bias="all"), Bitfit(name="bitfit"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("target", "bias"), [("attn.qkv + mlp.up", "lora_only"), ("attn.qkv", "all"), ("attn.q", "lora_only")])
def test_peft_loads_the_folder_and_so_do_we(tmp_path: Path, kind: str, target: str, bias: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = base_folder(tmp_path, "gpt2")
    model = saved_run(tmp_path / "run", base, wrapper(kind, target=target, bias=bias))
    wanted = model(input_ids=IDS).logits
    done = export_peft(tmp_path / "run")
    assert json.loads((done.path / "adapter_config.json").read_text())["bias"] == bias
    assert any("read bias" in note for note in done.notes)
    twin = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), done.path).eval()
    torch.testing.assert_close(twin(input_ids=IDS).logits, wanted, atol=1e-4 * done.difference.scale, rtol=1e-4)
    back = open_model(ModelSection(path=str(done.path)), TokenizerSection()).model
    torch.testing.assert_close(back(input_ids=IDS).logits, wanted, atol=1e-4 * done.difference.scale, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_folder_that_peft_wrote_is_read_with_its_biases(tmp_path: Path, kind: str, bias: str) -> None:
    """Of AdaLoRA also where a module kept its bias and no rank."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base = base_folder(tmp_path, attention_bias=True)
    schedule = {"target_r": 1, "tinit": 1, "tfinal": 2, "total_step": 6} if kind == "adalora" else {}
    config = peft_config(kind, ["q_proj", "v_proj", "k_proj"], bias=bias, **schedule)
    twin = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    fill(twin, scale=0.1)
    if kind == "adalora":
        for step in range(1, 6):
            twin(input_ids=IDS, labels=IDS).loss.backward()
            twin.base_model.update_and_allocate(step)
            twin.zero_grad()
        assert 0 in [sum(kept) for kept in twin.peft_config["default"].rank_pattern.values()]
    wanted = twin.eval()(input_ids=IDS).logits
    twin.save_pretrained(tmp_path / "adapter")
    model = open_model(ModelSection(path=str(tmp_path / "adapter")), TokenizerSection()).model
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=2e-4, rtol=1e-4)
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    moved = [f"{path}.bias" for path, _, _, hook in masters(model) if not torch.equal(hook.bias, start[f"{path}.bias"])]
    assert len(moved) == 2 * (4 if bias == "all" else 3)


def test_a_pruned_adalora_is_attached_again_with_its_biases() -> None:
    model = tiny_model("gpt2")
    options = {"target": "attn.q|v", "bias": "lora_only", "tinit": 1, "tfinal": 3, "total_step": 8, "prune": "at_final"}
    stack = put(model, wrapper("adalora", **options))
    stack.calibrate(model, Probe(None, None, steps=8))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(8):
        stack.before_step(model, step)
        nn.functional.cross_entropy(model(input_ids=IDS).logits[0, :-1], IDS[0, 1:]).backward()
        optimizer.step()
        stack.after_step(model, step)
        optimizer.zero_grad()
    structures = stack.structures(model)
    assert structures["adalora"]["pruned"] and not any("bias" in part for part in structures["adalora"]["pruned"])
    again = tiny_model("gpt2")
    other = Stack([wrapper("adalora", **options)])
    other.attach(again, structures)
    other.restore(again, stack.delta(model))
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
