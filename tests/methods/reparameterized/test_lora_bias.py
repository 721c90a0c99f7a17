"""LoRA's `bias`: where the base's own biases, trained beside the branches, start and go, and who may not share them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._engines.biases import masters
from llmrecipe.methods.reparameterized.dora import Dora
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.methods.selective.bitfit import Bitfit
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.runs import delta
from llmrecipe.runs.open_model import LoadedModel, merge_order
from tests.interop.saved_runs import fill
from tests.methods.twins import IDS
from tests.tiny import tiny_model


def put(model: nn.Module, *wrappers: Any) -> Stack:
    stack = Stack(list(wrappers))
    stack.attach(model)
    return stack


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_step_zero_and_the_switched_off_adapter_are_the_base_bit_for_bit(bias: str) -> None:
    base = tiny_model("gpt2")(input_ids=IDS).logits
    model = tiny_model("gpt2")
    stack = put(model, Lora(name="lora", target="attn.q|v", bias=bias))
    assert torch.equal(model(input_ids=IDS).logits, base)
    assert stack.reference_is_off()
    fill(model)
    assert not torch.equal(model(input_ids=IDS).logits, base)
    with activate(Context(role="reference")):
        assert torch.equal(model(input_ids=IDS).logits, base)


def test_counts_and_the_rate_of_b_leave_the_biases_of_the_base_alone() -> None:
    model = tiny_model("gpt2")
    stack = put(model, Lora(name="lora", target="attn.q|v", r=4, bias="lora_only", lora_bias=True, lr_ratio=8.0))
    # q and v of two layers: A and B, b_B, and the q and v thirds of the fused bias.
    assert stack.wrappers[0].memory(model)["trainable"] == 2 * 2 * (4 * (32 + 32) + 32 + 32)
    (group,) = stack.groups(model)
    assert len(group.names) == 8 and not any("__bias" in name for name in group.names)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_merging_puts_the_trained_biases_in_place_and_adds_the_branches_to_them(bias: str, lora_bias: bool) -> None:
    model = tiny_model("gpt2")
    before = model.transformer.h[0].attn.c_attn.bias.detach().clone()
    stack = put(model, Lora(name="lora", target="attn.q|v", bias=bias, lora_bias=lora_bias, r=4, alpha=6.0))
    fill(model)
    host = model.transformer.h[0].attn.c_attn
    wanted = before.clone()
    for _, module, _, hook in masters(model):
        if module is host:
            wanted = hook.weight(wanted)
    if lora_bias:
        wanted = wanted.index_add(0, host.lora__q.rows, 1.5 * host.lora__q.bias)
        wanted = wanted.index_add(0, host.lora__v.rows, 1.5 * host.lora__v.bias)
    unmerged = model(input_ids=IDS).logits
    stack.wrappers[0].merge(model)
    assert not list(all_hooks(model))
    torch.testing.assert_close(model.transformer.h[0].attn.c_attn.bias, wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model(input_ids=IDS).logits, unmerged, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("second", [Dora, Lora])
def test_stacked_on_another_branch_it_folds_in_the_order_of_the_forward_pass(second: Any) -> None:
    """A bias put in place late would overwrite what the first branch's bias added to it; DoRA must see the bare weight."""
    model = tiny_model("gpt2")
    first = Lora(name="first", target="attn.q", r=2, lora_bias=second is Lora)
    others = [first, second(name="second", target="attn.q", r=2), Lora(name="third", target="attn.v", r=2, bias="all")]
    stack = put(model, *others)
    fill(model)
    unmerged = model(input_ids=IDS).logits
    loaded = LoadedModel(model, None, None, mounted=stack.wrappers)  # type: ignore[arg-type]
    for wrapper in merge_order(loaded):
        wrapper.merge(model)
    assert not list(all_hooks(model))
    torch.testing.assert_close(model(input_ids=IDS).logits, unmerged, atol=5e-5, rtol=1e-4)


def test_what_has_no_biases_is_refused_with_the_way_out() -> None:
    for target, bias, words in (("attn.q", "all", "this model has"), ("attn.q", "lora_only", "'attn.q' has")):
        with pytest.raises(ModelError, match=rf"stack.lora.bias: {words} no biases to train; lora_bias=true"):
            put(tiny_model(), Lora(name="lora", target=target, bias=bias))


def test_two_methods_of_a_stack_do_not_train_one_bias() -> None:
    with pytest.raises(ModelError, match=r"stack.bitfit: stack.lora trains the same biases; let one of the two train them"):
        put(tiny_model("gpt2"), Lora(name="lora", bias="all"), Bitfit(name="bitfit"))
    put(tiny_model("gpt2"), Lora(name="lora", target="attn.q", bias="lora_only"), Bitfit(name="bitfit", terms=["output"]))


@pytest.mark.parametrize("above", [Bitfit(name="bitfit"), Lora(name="lora", bias="all"), Lora(name="lora", bias="lora_only")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_trained_below_are_where_the_next_run_starts(above: Any, dtype: torch.dtype) -> None:
    first = tiny_model("gpt2").to(dtype)
    stack = put(first, Bitfit(name="bitfit"))
    fill(first)
    layer = delta.Layer({"bitfit": delta.wrapper_mapping(stack.wrappers[0])}, {}, tensors=stack.delta(first))
    model = tiny_model("gpt2").to(dtype)
    delta.mount_layer(model, layer, 0)
    wanted = model(input_ids=IDS).logits
    assert torch.equal(wanted, first(input_ids=IDS).logits)
    upper = put(model, above)
    assert torch.equal(model(input_ids=IDS).logits, wanted)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    below = stack.delta(first)
    for name, p in trained.items():
        if "__q" not in name and "__v" not in name:
            path = name.rpartition(".")[0].rpartition(".")[0]
            assert torch.equal(p, below[f"{path}.bitfit.bias"]), name
    fill(model, seed=9)  # what trains, so not what lies below
    with activate(Context(role="reference")):
        assert torch.equal(model(input_ids=IDS).logits, wanted)
    unmerged = model(input_ids=IDS).logits
    if dtype == torch.float32:
        loaded = LoadedModel(model, None, None, mounted=[*_mounted(model, layer), *upper.wrappers])  # type: ignore[arg-type]
        for wrapper in merge_order(loaded):
            wrapper.merge(model)
        torch.testing.assert_close(model(input_ids=IDS).logits, unmerged, atol=2e-5, rtol=1e-4)


def _mounted(model: nn.Module, layer: delta.Layer) -> list[Any]:
    from dataclasses import replace

    return [replace(delta.build_wrapper("bitfit", layer.wrappers["bitfit"]), name="mounted0_bitfit")]
