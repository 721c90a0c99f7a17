"""Every registered objective through the same promises, on rows of unequal length, one of them with a single target.

In float64 on a small model: the loss is a sum; packed rows, padded rows and one row at a time give the same loss and the same
gradients; a step is one step however it is cut; evaluation does not know its batches; a micro-batch without rows is nothing;
the values declared for step 0 hold; all of it with every weight, LoRA or a prefix trained. Marked slow, through whole runs of
the objective's own recipe: what was stopped goes on to the bit. Two processes: tests/runtime/test_process_matrix.py.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from llmrecipe.core import registry
from llmrecipe.recipe.inheritance import DefaultsChain
from llmrecipe.recipe.recipe_paths import all_recipes
from tests.methods.kinds import wide_norms
from tests.objectives.harness import OBJECTIVES, READ, STACKS, Case, update
from tests.runtime.test_process_matrix import HYPERMODEL, LIMIT, sampled
from tests.tiny import tiny_model
from tests.trainings import curve, resumes_to_the_bit

WAYS = {"padded": (False, None), "one row at a time": (True, 1), "padded by threes": (False, 3), "packed by threes": (True, 3)}
"""(packing, rows of a micro-batch) of every way that is compared with one packed batch."""
OWN = "its own stack"
"""Where an objective trains a hypermodel: no other wrapper shares its stack."""
PICTURED = ("image_classification",)
"""Objectives whose recipe trains a vision transformer."""


@pytest.fixture(autouse=True)
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it norms round to float32, and the order of additions shows."""
    wide_norms(monkeypatch, tiny_model())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-9, rtol: float = 1e-7) -> None:
    """Tensors by name agree."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_docstring_states_a_formula_and_every_option_is_explained(name: str) -> None:
    spec = registry.spec("objective", name)
    assert "=" in spec.doc
    assert all(option.doc for option in spec.options.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_a_sum_and_knows_neither_layout_nor_neighbours(name: str) -> None:
    """Totals, weights, metrics and gradients of parts add up to those of the joined batch."""
    case = Case(name)
    (joined,) = case.micros()
    total, weight, metrics, gradients = case.sums([joined])
    assert weight > 0 and max(float(g.abs().max()) for g in gradients.values()) > 1e-4
    for packing, micro in WAYS.values():
        other = Case(name, packing=packing, micro=micro)
        parts = other.micros()
        cut = 1 if micro is None or other.objective.whole_step else -(-len(case.rows) // micro)
        assert len(parts) == cut or name not in READ
        found = other.sums(parts)
        assert found[:2] == (pytest.approx(total, rel=1e-7, abs=1e-9), pytest.approx(weight))
        assert found[2].keys() == metrics.keys()
        for metric, value in metrics.items():
            if not metric.endswith("_per_s"):  # a clock's
                assert found[2][metric] == pytest.approx(value, rel=1e-6, abs=1e-8), metric
        same(gradients, found[3])


@pytest.mark.parametrize("name", READ)
def test_micro_batches_are_one_batch(name: str) -> None:
    """Through the loop's own rule: cut into eight, four or two, a step moves every trained tensor as the uncut batch does."""
    whole, moved = update(name, None)
    assert max(float(d.abs().max()) for d in moved.values()) > 1e-4
    for micro in (1, 2, 4):
        parts, piecewise = update(name, micro)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-7)
        assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-9)
        for metric, value in whole.metrics.items():
            assert parts.metrics[metric] == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), metric
        same(moved, piecewise, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", READ)
def test_a_short_last_step_is_divided_by_its_own_rows(name: str) -> None:
    """A window that is cut off by the end of an epoch: two rows as two micro-batches equal the batch of two."""
    whole, moved = update(name, None, count=2)
    parts, piecewise = update(name, 1, count=2)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-7)
    same(moved, piecewise, atol=1e-10, rtol=1e-8)


# KTO's reference point moves with the policy and sends no gradient: its loss falls otherwise than along its gradient.
@pytest.mark.parametrize("name", [n for n in READ if n != "kto"])
def test_the_logged_loss_is_the_loss_that_is_optimised(name: str) -> None:
    """For a small move along the gradient, the logged loss falls by its squared norm: the number and the gradient belong."""
    result, moved = update(name, 2)
    rate = 1e-4 / float(result.grad_norm or 1.0)
    case = Case(name)
    with torch.no_grad():
        for key, parameter in case.model.named_parameters():
            parameter.add_(moved[key], alpha=rate)
    later, weight, *_ = case.sums(case.micros())
    assert (result.loss - later / weight) / rate == pytest.approx(float(result.grad_norm) ** 2, rel=2e-3)


@pytest.mark.parametrize("name", READ)
def test_evaluation_does_not_know_its_batches(name: str) -> None:
    """Sums over all rows, divided once, whatever the batches and the layout."""
    found = []
    for packing, cuts in ((True, [8]), (False, [3, 5]), (True, [1, 6, 1])):
        case = Case(name, packing=packing)
        case.roles.engine.eval()
        rows = case.objective.evaluation_rows(case.roles.data, list(range(len(case.rows))))
        sums: dict[str, list[float]] = {}
        tensors: dict[str, list[torch.Tensor]] = {}
        start = 0
        with torch.no_grad():
            for size in cuts:
                batch = case.objective.collate(rows[start : start + size], case.roles)
                for key, (value, count) in case.objective.evaluate(batch, case.roles).items():
                    known = sums.setdefault(key, [0.0, 0.0])
                    known[0], known[1] = known[0] + float(value), known[1] + float(count)
                for key, tensor in case.objective.collect(batch, case.roles).items():
                    tensors.setdefault(key, []).append(tensor)
                start += size
        means = {k: s / c for k, (s, c) in sums.items() if c}
        found.append(means | case.objective.finish_evaluation(means, {k: torch.cat(v) for k, v in tensors.items()}))
    assert all(other == pytest.approx(found[0], rel=1e-7, abs=1e-9) for other in found[1:])
    assert math.isfinite(found[0]["loss"]) and set(found[0]) - {"loss"} <= set(case.objective.measures())


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", READ)
def test_a_micro_batch_without_rows_is_nothing(name: str, packing: bool) -> None:
    """A process that has no rows left takes part in the step: weight 0, loss 0 with a graph, gradients exactly 0."""
    case = Case(name, packing=packing)
    (batch,) = case.micros([])
    assert batch.tokens == 0, "what fills it was not read"
    total, weight, metrics, gradients = case.sums([batch])
    assert (total, weight) == (0.0, 0.0)
    assert all(value == (0.0, 0.0) for value in metrics.values())
    assert all(not g.any() for g in gradients.values()), "NaN is no zero either"


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_starts_where_it_says_and_trains_under(name: str, kind: str) -> None:
    """The declared values of step 0, and finite gradients for what the stack trains and nothing else."""
    case = Case(name, kind)
    (batch,) = case.micros()
    total, weight, metrics, gradients = case.sums([batch])
    found = {"loss": total / weight} | {k: s / c for k, (s, c) in metrics.items() if c}
    wanted = case.objective.step_zero()
    assert {k: found[k] for k in wanted if k in found} == pytest.approx(
        {k: v for k, v in wanted.items() if k in found}, abs=1e-6
    )
    assert all(bool(torch.isfinite(g).all()) for g in gradients.values())
    assert any(bool(g.any()) for g in gradients.values())
    if kind != "full":
        assert len(gradients) < len(dict(case.model.named_parameters()))
        assert all(p.grad is None for p in case.model.parameters() if not p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in OBJECTIVES for k in ([OWN] if n in HYPERMODEL else STACKS)])
def test_a_run_that_was_stopped_goes_on_to_the_bit(name: str, kind: str, tmp_path: Path) -> None:
    """Two steps and two more are four, through the objective's own recipe."""
    recipe = recipe_of(name)
    stack = [] if kind == OWN else ["stack=[]"] if kind == "full" else [f"stack=[{kind}]"]
    # The model of images has no gate in its feed-forward.
    options = {
        k: v.replace("gate|", "") if isinstance(v, str) and name in PICTURED else v for k, v in STACKS.get(kind, {}).items()
    }
    stack += [f"stack.{kind}.{key}={value}" for key, value in options.items()]
    limit = LIMIT.get(name, ["data.limit=34"] if name == "token_classification" else ["data.limit=8"])
    small = ["steps=4", "batch.size=3", "batch.micro=2", "data.max_length=64", "eval.batches=1", "eval.every=null"]
    words = [*small, *limit, *stack, *sampled(name)]
    resumes_to_the_bit(tmp_path, recipe, words, 2)
    assert len(curve(tmp_path / "whole")) == 4


def recipe_of(name: str) -> str:
    """The recipe that trains an objective: called as it is, or the first that chooses it."""
    if name in all_recipes():
        return name
    chains = ((recipe, DefaultsChain(path)) for recipe, path in all_recipes().items())
    return next(recipe for recipe, chain in chains if chain.choice(chain.primary.id, "objective") == name)
