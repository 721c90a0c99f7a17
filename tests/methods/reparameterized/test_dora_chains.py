"""DoRA on what an earlier run, or another method of the stack, learned: its norm is that of the weight it stands on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._engines.quantized import dense_weight, dequantize_model
from llmrecipe.methods.memory.nf4 import Nf4
from llmrecipe.methods.reparameterized.dora import Dora
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.runs import delta
from llmrecipe.runs.open_model import LoadedModel, merge_order
from tests.interop.saved_runs import fill
from tests.methods.twins import IDS
from tests.tiny import tiny_model


def fresh(family: str, below: tuple[Any, ...]) -> nn.Module:
    model = tiny_model(family, **({"attention_bias": True} if family == "llama" else {}))
    Stack(list(below)).attach(model)
    return model


def chain(family: str, first: Any, second: Any, *below: Any) -> tuple[nn.Module, list[Any], Stack]:
    """A run of `first`, and one of `second` on it, both away from their starts."""
    run = fresh(family, below)
    stack = Stack([first])
    stack.attach(run)
    fill(run, scale=0.05)
    stack.after_step(run, 0)
    wanted = run(input_ids=IDS).logits
    tensors = {name: value.clone() for name, value in stack.delta(run).items()}
    model = fresh(family, below)
    mounted = list(delta.mount_layer(model, delta.Layer({first.name: delta.wrapper_mapping(first)}, {}, tensors=tensors), 0))
    upper = Stack([second])
    upper.attach(model.train())
    model.eval()
    assert torch.equal(model(input_ids=IDS).logits, wanted), "step 0 is what lies below"
    fill(model, scale=0.05, seed=9)
    upper.after_step(model, 0)
    return model, mounted, upper


def decomposed(W: Tensor, hook: Any) -> Tensor:
    """m V / ||V||, V = W + s B A, in float64; rows of others stay."""
    rows = slice(None) if getattr(hook, "rows", None) is None else hook.rows
    part = W[rows]
    if hasattr(hook, "A"):
        part = part + hook.scale * hook.B.detach().double() @ hook.A.detach().double()
    own = (hook.magnitude.detach().double() / part.norm(dim=1))[:, None] * part
    return W.index_copy(0, torch.arange(len(W))[rows], own)


LINEAR = [
    ("llama", Dora(name="dora", target="attn.q", r=2, dropout=0.3), "attn.q", ()),
    ("llama", Dora(name="dora", target="attn.q", r=2), "attn.q", (Nf4(name="nf4"),)),
    ("llama", Dora(name="dora", target="mlp.up", magnitude_only="attn.q", r=2), "attn.q", ()),
    ("gpt2", Dora(name="dora", target="attn.q|v", r=2), "attn.v", ()),
    ("gpt2", Dora(name="dora", target="attn.q", r=2), "attn.qkv", ()),
]


@pytest.mark.parametrize(("family", "first", "target", "below"), LINEAR)
def test_on_the_dora_of_an_earlier_run_it_decomposes_that_runs_weight_and_folds(
    family: str, first: Any, target: str, below: tuple[Any, ...]
) -> None:
    model, mounted, upper = chain(family, first, Dora(name="dora", target=target, r=2), *below)
    path, layer, _, _ = next(place for place in all_hooks(model, "dora"))
    W = dense_weight(layer, torch.float32).double()
    for _, host, _, hook in [*all_hooks(model, "mounted0_dora"), *all_hooks(model, "dora")]:
        W = decomposed(W, hook) if host is layer else W
    x = torch.randn(5, W.shape[1], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x).double(), x.double() @ W.t() + layer.bias.double(), atol=2e-5, rtol=1e-4)
    wanted = model(input_ids=IDS).logits
    dequantize_model(model)
    for wrapper in merge_order(LoadedModel(model, None, None, mounted=[*mounted, *upper.wrappers])):  # type: ignore[arg-type]
        wrapper.merge(model)
    assert not list(all_hooks(model))
    merged = model.get_submodule(path).weight.double()
    torch.testing.assert_close(merged.t() if family == "gpt2" else merged, W, atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("first", [Lora(name="lora", target="embed", r=2), Dora(name="dora", target="embed", r=2)])
def test_on_an_embedding_that_an_earlier_run_adapted_too(first: Any) -> None:
    model, mounted, upper = chain("llama", first, Dora(name="dora", target="embed", r=2))
    table = model.model.embed_tokens
    (_, _, _, lower), (_, _, _, hook) = all_hooks(model)
    E = table.weight.detach().double().t()
    if isinstance(first, Lora):
        E = E + lower.scale * lower.B.double() @ lower.A.double()
    else:
        E = decomposed(E, lower)
    E = decomposed(E, hook)
    torch.testing.assert_close(table(IDS).double(), E.t()[IDS], atol=1e-5, rtol=1e-4)
    wanted = model(input_ids=IDS).logits
    upper.after_step(model, 0)
    for wrapper in merge_order(LoadedModel(model, None, None, mounted=[*mounted, *upper.wrappers])):  # type: ignore[arg-type]
        wrapper.merge(model)
    torch.testing.assert_close(table.weight.double(), E.t(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-3)


STACKED = [
    ("llama", Dora(name="low", target="attn.q", r=2), Dora(name="high", target="attn.q", r=2)),
    ("llama", Lora(name="low", target="embed", r=2), Dora(name="high", target="embed", r=2)),
    ("gpt2", Dora(name="low", target="attn.q", r=2), Dora(name="high", target="attn.v", r=2)),
]


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(("family", "low", "high"), STACKED)
def test_what_lies_below_may_learn_too(family: str, low: Any, high: Any, in_place: bool) -> None:
    """After every step the norm is that of the weight as it is then, also when it was written through raw memory."""
    model = fresh(family, ())
    stack = Stack([low, high])
    stack.attach(model)
    assert torch.equal(model(input_ids=IDS).logits, fresh(family, ())(input_ids=IDS).logits)
    generator = torch.Generator().manual_seed(3)
    for step in range(2):
        stack.before_step(model, step)
        for parameter in [p for p in model.parameters() if p.requires_grad]:
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            with torch.no_grad():
                parameter.data.add_(noise) if in_place else parameter.add_(noise)
        stack.after_step(model, step)
        _, host, _, _ = next(iter(all_hooks(model)))
        embeds = isinstance(host, nn.Embedding)
        W = host.weight.detach().double().t() if embeds else dense_weight(host).double()
        lower, upper = (getattr(host, n) for n in host._hook_names)
        if isinstance(low, Lora):
            W = W + lower.scale * lower.B.detach().double() @ lower.A.detach().double()
        else:
            W = decomposed(W, lower)
        W = decomposed(W, upper)
        x = IDS if embeds else torch.randn(5, W.shape[1], generator=generator)
        wanted = W.t()[IDS] if embeds else x.double() @ W.t() + host.bias.double()
        torch.testing.assert_close(host(x).double(), wanted, atol=2e-5, rtol=1e-4)
    unmerged = model(input_ids=IDS).logits
    stack.after_step(model, 2)
    for wrapper in merge_order(LoadedModel(model, None, None, mounted=stack.wrappers)):  # type: ignore[arg-type]
        wrapper.merge(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, unmerged, atol=1e-4, rtol=1e-3)


def test_a_skeleton_on_four_bits_is_built_without_a_weight() -> None:
    with torch.device("meta"):
        model = tiny_model(scale=1.0)
    stack = Stack([Nf4(name="nf4"), Dora(name="dora", target="attn.q|v", magnitude_only="mlp.up", r=4)])
    stack.attach(model)
    assert stack.wrappers[1].memory(model)["trainable"] == 2 * (4 * (32 + 32) + 32 + 4 * (32 + 16) + 16 + 48)
