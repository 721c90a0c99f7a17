"""What selections promise against each other, in the direction the papers report, where it is small enough to be seen."""

from __future__ import annotations

import pytest
import torch

from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.methods.selective._engines.sparse_method import base_weights, sparse_hooks
from llmrecipe.methods.selective.diff_pruning import DiffPruning
from llmrecipe.methods.selective.group_mask import GroupMask
from llmrecipe.methods.selective.spt import Spt
from tests.methods.probe import language_probe
from tests.methods.teacher import count, learned, teacher
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow


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
        assert sum(hook.values.numel() for _, _, hook in sparse_hooks(model, "diff")) == 392
        empty.append(len(base_weights(model)) - len({hook.source for _, _, hook in sparse_hooks(model, "diff")}))
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
