"""What low-rank methods promise against each other, in the direction the papers report, where it is small enough to be seen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.reparameterized.adalora import Adalora
from llmrecipe.methods.reparameterized.dora import Dora
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.hooks.hook import all_hooks
from tests.methods.teacher import (
    PLANTED,
    apart,
    count,
    distance,
    language,
    learned,
    mean,
    sentences,
    teacher,
    token_loss,
    tokens,
    train,
)
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow


def test_adalora_puts_its_ranks_where_the_change_is_and_beats_lora_at_the_same_budget() -> None:
    """14 layers, a mean rank of one, changes of rank 4 in two of them."""
    other = teacher(4, 0.15)
    _, flat = learned(Lora(name="lora", target="all-linear", r=1, alpha=1.0), other, 300, 1e-2)
    moving = Adalora(
        name="adalora",
        target="all-linear",
        init_r=4,
        target_r=1,
        alpha=4.0,
        tinit=60,
        tfinal=120,
        deltaT=5,
        orth_reg_weight=0.1,
    )
    model, best = learned(moving, other, 300, 1e-2)
    ranks = {path: int(hook.kept.sum()) for path, _, _, hook in all_hooks(model, "adalora")}
    assert sum(ranks.values()) == 14
    assert min(ranks[path] for path in PLANTED) >= 2, ranks
    assert best < 0.5 * flat


def test_larger_ranks_keep_learning_under_rslora_and_stall_under_alpha_over_r() -> None:
    other = teacher(32, 0.03, [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)])

    def ends(scaled: bool) -> list[float]:
        return [
            learned(Lora(name="lora", target="attn.q", r=r, alpha=4.0, use_rslora=scaled), other, 100, 1e-3)[1]
            for r in (2, 8, 32)
        ]

    plain, stable = ends(False), ends(True)
    assert stable[2] < 0.85 * stable[1] < 0.85 * stable[0]
    assert plain[2] > 0.9 * plain[0]
    assert stable[2] < 0.7 * plain[2]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lora_reaches_the_loss_of_full_fine_tuning_on_a_shifted_language_and_a_frozen_b_learns_nothing(seed: int) -> None:
    """Pre-trained on one language, tuned on another: the base is 1.1 to 1.2 above full fine-tuning there."""
    old, new = language(seed, False), language(seed, True)
    base = tiny_model(seed=seed, scale=1.0)
    train(base, Stack([]), lambda step: token_loss(base, sentences(old, step)), 300, 1e-2)

    def tuned(*wrappers: Any, rate: float, frozen: str = "nothing") -> tuple[float, int]:
        model, stack = copy.deepcopy(base), Stack(list(wrappers))
        torch.manual_seed(seed)
        stack.attach(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and not name.endswith(f".{frozen}"))
        train(model, stack, lambda step: token_loss(model, sentences(new, 5000 + step)), 300, rate)
        return mean(lambda i: token_loss(model, sentences(new, i))), count(model)

    lora = Lora(name="lora", target="all-linear", r=4, alpha=8.0)
    (full, everything), (ours, few) = tuned(rate=3e-3), tuned(lora, rate=1e-2)
    frozen, _ = tuned(lora, rate=1e-2, frozen="B")
    start = mean(lambda i: token_loss(base, sentences(new, i)))
    assert few < 0.2 * everything
    assert ours < 1.05 * full, (ours, full)
    assert frozen == pytest.approx(start, abs=1e-6)
    assert start > 1.3 * full


DECOMPOSED = "attn.q|v + mlp.up|down"


def decomposed(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if n.endswith(("q_proj", "v_proj", "up_proj", "down_proj"))}


def turned_and_scaled(seed: int) -> nn.Module:
    """A teacher whose rows point elsewhere by a change of rank 2 and are longer or shorter by a third."""
    model, generator = tiny_model(seed=seed), torch.Generator().manual_seed(seed + 7)
    with torch.no_grad():
        for module in decomposed(model).values():
            W: Any = module.weight
            V = W + 0.1 * torch.randn(W.shape[0], 2, generator=generator) @ torch.randn(2, W.shape[1], generator=generator)
            m = W.norm(dim=1) * torch.exp(0.3 * torch.randn(W.shape[0], generator=generator))
            W.copy_(m[:, None] * F.normalize(V, dim=1))
    return model


def changes(model: nn.Module, start: dict[str, Tensor]) -> list[tuple[float, float]]:
    """(dM, dD) of each weight as its layer computes with it: mean |m - m0| and mean 1 - cos(V, W0) over the rows."""
    found = []
    with torch.no_grad():
        for path, module in decomposed(model).items():
            W, W0 = module(torch.eye(start[path].shape[1])[None])[0].t(), start[path]
            length = (W.norm(dim=1) - W0.norm(dim=1)).abs().mean()
            found.append((float(length), float((1 - F.cosine_similarity(W, W0, dim=1)).mean())))
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dora_beats_lora_at_equal_and_half_rank_and_its_two_changes_go_together_less(seed: int) -> None:
    """Section 4.1 of the paper: over weights and steps, LoRA changes magnitude and direction in proportion, DoRA does not."""
    other = turned_and_scaled(seed)

    def run(kind: type, r: int) -> tuple[float, float]:
        model, stack = tiny_model(seed=seed), Stack([kind(name="w", target=DECOMPOSED, r=r, alpha=2.0 * r)])
        start = {path: module.weight.detach().clone() for path, module in decomposed(model).items()}
        torch.manual_seed(seed)
        stack.attach(model)
        points: list[tuple[float, float]] = []

        def each(step: int) -> None:
            if step % 75 == 74:
                points.extend(changes(model, start))

        train(model, stack, lambda step: distance(model, other, tokens(step)), 300, 5e-3, each)
        return apart(model, other), float(torch.corrcoef(torch.tensor(points).t())[0, 1])

    (lora, together), (dora, apart_from), (half, _) = run(Lora, 4), run(Dora, 4), run(Dora, 2)
    assert dora < 0.6 * lora and half < 0.9 * lora, (lora, dora, half)
    assert together > 0.7 and apart_from < together - 0.3, (together, apart_from)
