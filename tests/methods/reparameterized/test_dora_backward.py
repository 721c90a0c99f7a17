"""DoRA's backward pass: what is kept for it, in bytes beside LoRA's and peft's, and its gradients where that could go wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._engines.dora_norm import INVERTIBLE, Rescaled
from llmrecipe.methods._engines.quantized import dense_weight
from llmrecipe.methods.reparameterized.dora import Dora
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.hooks.hook import EDIT, Hook, all_hooks
from llmrecipe.models.hooks.host import add_hook
from llmrecipe.training.memory_estimate import retained_bytes, saved_bytes
from tests.interop.saved_runs import fill
from tests.support import PeakBytes
from tests.tiny import tiny_model

WIDTH, FFN, LAYERS, ROWS, TOKENS = 128, 352, 2, 4, 64
IDS = torch.randint(5, 64, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))


def base() -> nn.Module:
    shape = {"hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_key_value_heads": 4}
    return tiny_model(scale=1.0, **shape)


def with_ours(wrapper: Any) -> nn.Module:
    model = base()
    Stack([wrapper]).attach(model)
    return model.train()


def with_peft(targets: list[str]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(base(), LoraConfig(target_modules=targets, r=8, lora_alpha=16, use_dora=True)).train()


def loss_of(model: nn.Module) -> Tensor:
    logits = model(input_ids=IDS, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def measured(model: nn.Module) -> tuple[int, int]:
    """(bytes kept for backward, bytes at the peak of forward and backward), weights and their gradients aside."""
    there = [*model.parameters(), *model.buffers()]
    loss, kept = saved_bytes(lambda: loss_of(model), there)
    if not hasattr(model, "peft_config"):
        assert retained_bytes(loss, there) == kept, "something is parked where hooks do not see it"
    loss.backward()
    model.zero_grad(set_to_none=False)
    there += [p.grad for p in model.parameters() if p.grad is not None]
    with PeakBytes(there) as live:
        loss_of(model).backward()
    return kept, live.peak


CASES = [
    # The attention keeps v, the feed-forward its two halves.
    ("attn.v + mlp.gate|up", ["v_proj", "gate_proj", "up_proj"], WIDTH + 2 * FFN, 0),
    # q and k are kept rotated, and the residual stream only as a sum.
    ("attn.q|v", ["q_proj", "v_proj"], 2 * WIDTH, 1),
    ("all-linear", "all-linear", 5 * WIDTH + 2 * FFN, 4),
]


@pytest.mark.parametrize(("target", "targets", "outputs", "alone"), CASES)
def test_beyond_lora_it_keeps_two_vectors_and_the_outputs_nobody_else_keeps(
    target: str, targets: list[str], outputs: int, alone: int
) -> None:
    lora, lora_peak = measured(with_ours(Lora(name="lora", target=target, r=8)))
    kept, peak = measured(with_ours(Dora(name="dora", target=target, r=8)))
    theirs, theirs_peak = measured(with_peft(targets))
    # g and ||V||, float32.
    beyond = LAYERS * 4 * (alone * ROWS * TOKENS * WIDTH + 2 * outputs)
    assert kept - lora == beyond
    assert 0 <= peak - lora_peak <= beyond + 4 * ROWS * TOKENS * FFN
    assert kept < theirs and peak < theirs_peak


def gradients_by_hand(layer: nn.Module, hook: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Of sum dy y, y = b + m / ||V|| V x with V = W + s B A and a norm that does not learn: float64 autograd on the formula."""
    W = dense_weight(layer).detach().double()
    rows = slice(None) if hook.rows is None else hook.rows
    leaves = {n: getattr(hook, n).detach().double().requires_grad_() for n in ("A", "B", "magnitude")}
    leaves["x"] = x.detach().double().requires_grad_()
    V = W[rows] + hook.scale * leaves["B"] @ leaves["A"]
    y = leaves["x"] @ W.t()
    own = leaves["x"] @ ((leaves["magnitude"] / V.detach().norm(dim=1))[:, None] * V).t()
    y = y.index_copy(-1, torch.arange(len(W))[rows], own)
    return dict(zip(leaves, torch.autograd.grad((y * dy.double()).sum(), list(leaves.values())), strict=True))


@pytest.mark.parametrize(("family", "biased", "target"), [
    ("llama", True, "attn.q"), ("llama", False, "attn.q"), ("gpt2", True, "attn.v"),
])  # fmt: skip
@pytest.mark.parametrize("smallest", [1.0, INVERTIBLE / 2, 0.0])
def test_gradients_are_those_of_the_formula_also_where_a_gain_is_next_to_nothing(
    family: str, biased: bool, target: str, smallest: float
) -> None:
    model = tiny_model(family, **({"attention_bias": biased} if family == "llama" else {}))
    Stack([Dora(name="dora", target=target, r=4, alpha=6.0)]).attach(model)
    fill(model, scale=0.02)
    _, layer, _, hook = next(iter(all_hooks(model)))
    with torch.no_grad():
        hook.magnitude[1] *= smallest
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 32, generator=generator, requires_grad=True)
    y = layer(x)
    dy = torch.randn(y.shape, generator=generator)
    assert _keeps_its_result(y) == (smallest == 1.0)
    got = torch.autograd.grad((y * dy).sum(), [hook.A, hook.B, hook.magnitude, x])
    for own, wanted in zip(got, gradients_by_hand(layer, hook, x, dy).values(), strict=True):
        torch.testing.assert_close(own.double(), wanted, atol=1e-4, rtol=1e-4)


def _keeps_its_result(y: Tensor) -> bool:
    """Whether the node of `Rescaled` is near the end of a graph."""
    nodes = [y.grad_fn, *(n for n, _ in y.grad_fn.next_functions if n is not None)]
    return any(type(n).__name__ == "RescaledBackward" for n in nodes)


@pytest.mark.parametrize("biased", [True, False])
def test_first_and_second_derivatives_of_the_rescaling(biased: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    v, gain, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 3, 4), (4,), (4,)))
    gain = gain.sign() * (gain.abs() + 0.5)
    inputs = [v.requires_grad_(), gain.requires_grad_(), bias.requires_grad_() if biased else None]
    assert torch.autograd.gradcheck(Rescaled.apply, inputs)
    assert torch.autograd.gradgradcheck(Rescaled.apply, inputs)


class Doubled(Hook):
    """Changes the result it is given where it stands, which no hook may do."""

    order = EDIT

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y.mul_(2.0)


def test_a_result_that_somebody_overwrites_is_an_error_and_no_wrong_gradient() -> None:
    model = tiny_model()
    Stack([Dora(name="dora", target="attn.q", r=4)]).attach(model)
    fill(model, scale=0.02)
    layer = model.model.layers[0].self_attn.q_proj
    add_hook(layer, "doubled", Doubled(), "doubled")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        layer(torch.randn(3, 32)).sum().backward()


@pytest.mark.parametrize("order", ["lora above", "lora below"])
def test_beside_another_branch_on_the_same_layer_both_have_their_gradients(order: str) -> None:
    """y = b + g (W x + s B A x) + 2 D C x."""
    model = tiny_model(attention_bias=True)
    both = [Dora(name="dora", target="attn.q", r=4, alpha=6.0), Lora(name="lora", target="attn.q", r=4, alpha=8.0)]
    Stack(both if order == "lora above" else both[::-1]).attach(model)
    fill(model, scale=0.05)
    layer = model.model.layers[0].self_attn.q_proj
    dora, lora = layer.dora, layer.lora
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(7, 32, generator=generator, requires_grad=True), torch.randn(7, 32, generator=generator)
    got = torch.autograd.grad((layer(x) * dy).sum(), [dora.A, dora.B, dora.magnitude, lora.A, lora.B, x])
    wanted = gradients_by_hand(layer, dora, x, dy)
    C, D, leaf = (t.detach().double().requires_grad_() for t in (lora.A, lora.B, x))
    second = torch.autograd.grad((2.0 * leaf @ C.t() @ D.t() * dy.double()).sum(), [C, D, leaf])
    sums = [wanted["A"], wanted["B"], wanted["magnitude"], second[0], second[1], wanted["x"] + second[2]]
    for own, value in zip(got, sums, strict=True):
        torch.testing.assert_close(own.double(), value, atol=1e-4, rtol=1e-4)


def test_in_bfloat16_a_magnitude_has_the_gradient_of_float64_within_rounding() -> None:
    model = tiny_model(attention_bias=True).to(torch.bfloat16)
    Stack([Dora(name="dora", target="attn.q", r=4)]).attach(model)
    layer = model.model.layers[0].self_attn.q_proj
    hook = layer.dora
    with torch.no_grad():
        hook.magnitude *= 1.002
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(400, 32, generator=generator).to(torch.bfloat16) for _ in range(2))
    y = layer(x)
    (own,) = torch.autograd.grad((y * dy).sum(), [hook.magnitude])
    assert own.dtype == torch.float32
    wanted = gradients_by_hand(layer, hook, x, dy)["magnitude"]
    torch.testing.assert_close(own.double(), wanted, atol=0.01 * float(wanted.abs().max()), rtol=0.02)
