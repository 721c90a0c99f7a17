"""Small tasks: a teacher, which is the base with changes planted in some of its weights, and a language that has shifted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipe.core import registry
from llmrecipe.methods._base.method import Probe
from llmrecipe.methods._base.stack import Stack
from llmrecipe.optim.optimizer import build_optimizer, parameter_groups
from tests.tiny import tiny_model

PLANTED = ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj")


def tokens(seed: int) -> Tensor:
    return torch.randint(3, 64, (8, 12), generator=torch.Generator().manual_seed(seed))


def teacher(rank: int, size: float, planted: Sequence[str] = PLANTED) -> nn.Module:
    model, generator = tiny_model(), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for path in planted:
            weight = model.get_submodule(path).weight
            left, right = (
                torch.randn(shape, generator=generator) for shape in ((weight.shape[0], rank), (rank, weight.shape[1]))
            )
            weight += size * left @ right
    return model


def distance(model: nn.Module, other: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = other(input_ids=ids).logits
    return (model(input_ids=ids).logits - wanted).square().mean()


def train(
    model: nn.Module,
    stack: Stack,
    loss: Callable[[int], Tensor],
    steps: int,
    rate: float,
    each: Callable[[int], None] | None = None,
) -> None:
    """AdamW without decay on `loss(step)` and the stack's penalty.

    Args:
        each: called after every step.
    """
    config = registry.load_class("optim", "adamw")(lr=rate, weight_decay=0.0)
    optimizer: torch.optim.Optimizer | None = None
    for step in range(steps):
        if stack.before_step(model, step) or optimizer is None:
            optimizer = build_optimizer(config, parameter_groups(model, config, stack.groups(model)))
        optimizer.zero_grad()
        (loss(step) + stack.penalty(model)).backward()
        stack.after_backward(model, step)
        optimizer.step()
        stack.after_step(model, step)
        if each is not None:
            each(step)


@torch.no_grad()
def mean(loss: Callable[[int], Tensor]) -> float:
    """A loss on data nobody trained on."""
    return sum(float(loss(10**6 + i)) for i in range(4)) / 4


def apart(model: nn.Module, other: nn.Module) -> float:
    """How far a student is from its teacher on tokens it has not seen."""
    return mean(lambda seed: distance(model, other, tokens(seed)))


def learned(wrapper: Any, other: nn.Module, steps: int, rate: float) -> tuple[nn.Module, float]:
    """A student after so many steps, and how far from its teacher it still is on tokens it has not seen."""
    model, stack = tiny_model(), Stack([wrapper])
    torch.manual_seed(1)
    stack.attach(model)

    def batches(n: int, rows: int | None = None) -> Iterator[Tensor]:
        return (tokens(10**7 + i) for i in range(n))

    stack.calibrate(model, Probe(batches, lambda ids: distance(model, other, ids), steps=steps))
    train(model, stack, lambda step: distance(model, other, tokens(step)), steps, rate)
    return model, apart(model, other)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def language(seed: int, shifted: bool) -> Tensor:
    """(V, V) next-token probabilities; shifted, half of the tokens are followed by what followed others."""
    table = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) * 2
    if shifted:
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed + 100))
        table[::2] = table[order][::2]
    return table.softmax(-1)


def sentences(table: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (16, 1), generator=generator)
    for _ in range(15):
        ids = torch.cat((ids, torch.multinomial(table[ids[:, -1]], 1, generator=generator)), 1)
    return ids


def token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
