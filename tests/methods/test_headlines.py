"""What the methods promise against each other, in the direction the papers report, where it is small enough to be seen here.

A teacher is the base with low-rank changes planted in some of its weights; a student learns its logits on random tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe import registry
from llmrecipe.methods.inject import all_ports
from llmrecipe.methods.reparameterized.adalora import Adalora
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.methods.selective.diff_pruning import DiffPruning
from llmrecipe.methods.selective.group_mask import GroupMask
from llmrecipe.methods.selective.spt import Spt
from llmrecipe.methods.sparse_wrapper import base_weights, sparse_ports
from llmrecipe.methods.stack import Stack
from llmrecipe.methods.wrapper import Probe
from llmrecipe.training.optimizer import build_optimizer, parameter_groups
from tests.methods.probe import language_probe
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow
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


def learned(wrapper: Any, other: nn.Module, steps: int, rate: float) -> tuple[nn.Module, float]:
    """A student after so many steps, and how far from its teacher it still is on tokens it has not seen."""
    model, stack = tiny_model(), Stack([wrapper])
    torch.manual_seed(1)
    stack.attach(model)

    def batches(n: int, rows: int | None = None) -> Iterator[Tensor]:
        return (tokens(10**7 + i) for i in range(n))

    stack.calibrate(model, Probe(batches, lambda ids: distance(model, other, ids), steps=steps))
    config = registry.load("optim", "adamw")(lr=rate, weight_decay=0.0)
    optimizer: torch.optim.Optimizer | None = None
    for step in range(steps):
        if stack.before_step(model, step) or optimizer is None:
            optimizer = build_optimizer(config, parameter_groups(model, config, stack.groups(model)))
        optimizer.zero_grad()
        (distance(model, other, tokens(step)) + stack.penalty(model)).backward()
        stack.after_backward(model, step)
        optimizer.step()
        stack.after_step(model, step)
    with torch.no_grad():
        return model, sum(float(distance(model, other, tokens(10**6 + i))) for i in range(4)) / 4


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


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
    ranks = {path: int(port.kept.sum()) for path, _, _, port in all_ports(model, "adalora")}
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


def test_spt_puts_its_budget_where_the_loss_is_sensitive_and_beats_lora_spread_evenly() -> None:
    other = teacher(4, 0.15)
    even, flat = learned(Lora(name="lora", target="all-linear", r=1, alpha=1.0), other, 300, 1e-2)
    chosen = Spt(name="spt", budget=float(count(even)), r=4, num_batches=8, dropout=0.0)
    model, best = learned(chosen, other, 300, 1e-2)
    assert count(model) <= count(even)
    assert best < 0.8 * flat


def test_structured_diff_pruning_leaves_most_tensors_alone_and_beats_unstructured_and_that_magnitude() -> None:
    """The paper's order at one density, and its count of tensors that keep no change at all."""
    other = teacher(4, 0.15)
    ends, empty = [], []
    for options in ({"mode": "structured"}, {"mode": "unstructured"}, {"mode": "unstructured", "adaptive": False}):
        gates = {} if "adaptive" in options else {"l0": 1e-5, "alpha_lr_scale": 20.0}
        wrapper = DiffPruning(name="diff", density=0.02, l0_steps=200, w_lr_scale=1.0, **options, **gates)
        model, end = learned(wrapper, other, 350, 5e-3)
        assert sum(port.values.numel() for _, _, port in sparse_ports(model, "diff")) == 392
        empty.append(len(base_weights(model)) - len({port.source for _, _, port in sparse_ports(model, "diff")}))
        ends.append(end)
    assert ends[0] < 0.7 * ends[1] and ends[1] < ends[2], ends
    assert empty[0] > 1.5 * empty[1] and empty[1] > empty[2], empty


def test_rows_of_large_fisher_information_beat_random_rows_at_the_same_budget() -> None:
    losses: dict[str, float] = {"fisher": 0.0, "random": 0.0}
    for seed in (0, 1):
        for score in losses:
            model = tiny_model(seed=seed)
            samples = 16 if score == "fisher" else 128
            stack = Stack([GroupMask(name="rows", score=score, density=0.05, num_samples=samples)])
            stack.attach(model)
            probe = language_probe(model, stack=stack)
            stack.calibrate(model, probe)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
            for step, batch in enumerate(probe.batches(40)):
                optimizer.zero_grad()
                probe.loss(batch).backward()
                optimizer.step()
                stack.after_step(model, step)
            with torch.no_grad():
                losses[score] += sum(float(probe.loss(b)) for b in probe.batches(16)) / 32
    assert losses["fisher"] < losses["random"] - 0.03, losses
