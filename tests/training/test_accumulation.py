"""One denominator a step: however its rows are cut into micro-batches, a step is the step of the whole batch.

Every objective makes one update through the loop's own rule, in float64, on rows of unequal length, one of them with a
single target. Cut into eight, four or two micro-batches it must move every trained tensor as the uncut batch does.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.core import registry
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._base.update_rule import StepContext, StepResult, backprop
from llmrecipe.recipe.schema import RuntimeSection
from llmrecipe.runtime.processes import Runtime
from llmrecipe.training.run import Run
from tests.tiny import Tokenizer, tiny_model
from tests.trainings import events, train_recipe

LENGTHS = [2, 9, 4, 7, 3, 11, 5, 6]


def ids(row: int, length: int, first: int = 3) -> list[int]:
    """Tokens that differ from row to row."""
    return [first + (7 * row + 5 * i) % 50 for i in range(length)]


def dialogue(row: int, length: int) -> dict[str, Any]:
    targets = max(1, length - 2)
    return {"row": row, "ids": ids(row, length), "trained": [0] * (length - targets) + [1] * targets}


def pair(row: int, length: int) -> dict[str, Any]:
    answers = {"chosen_ids": [*ids(row, length - 1, 5), 2], "rejected_ids": [*ids(row, 1 + row % 3, 9), 2]}
    return {"row": row, "prompt_ids": ids(row, 2 + row % 4), **answers}


def feedback(row: int, length: int) -> dict[str, Any]:
    return {"row": row, "prompt_ids": ids(row, 3), "completion_ids": [*ids(row, length, 5), 2], "label": row % 3 != 0}


def labelled(row: int, length: int) -> dict[str, Any]:
    return {"row": row, "ids": ids(row, length), "label": row % 3}


def question(row: int, length: int) -> dict[str, Any]:
    choices = [[*ids(row, 1 + (length + i) % 4, 5 + i), 2] for i in range(1 + row % 3)]
    flat = [token for choice in choices for token in choice]
    return {"row": row, "prompt_ids": ids(row, 2 + row % 4), "choice_ids": flat, "choice_lengths": [*map(len, choices)]}


MAKERS = {
    "dialogue": dialogue,
    "text": dialogue,
    "preference": pair,
    "unpaired": feedback,
    "labelled": labelled,
    "choices": question,
}
OBJECTIVES = [name for name in registry.names("objective") if registry.spec("objective", name).facts["rows"] in MAKERS]


def rows_of(objective: Any, count: int = len(LENGTHS)) -> list[dict[str, Any]]:
    return [MAKERS[objective.rows](row, length) for row, length in enumerate(LENGTHS[:count])]


def model_for(objective: Any) -> nn.Module:
    model = tiny_model()
    if objective.head == "classification":
        torch.manual_seed(3)
        model.score = nn.Linear(32, 3, bias=False)
    objective.prepare_model(model, 5)
    # A frozen language head would hide nothing here: every tensor trains.
    return model.double().train()


def update(
    name: str, micro: int | None, count: int = len(LENGTHS), **options: Any
) -> tuple[StepResult, dict[str, torch.Tensor]]:
    """One step of plain gradient descent at rate 1; what it reported and how far every tensor moved."""
    objective = registry.load("objective", name)()
    model, stack = model_for(objective), Stack([])
    stack.take_reference(model)
    roles = Roles(Engine(model), stack, Tokenizer(), torch.device("cpu"), True, micro)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    runtime = Runtime.start(RuntimeSection(device="cpu"))
    run: Any = SimpleNamespace(objective=objective, runtime=runtime, model=model, optim=SimpleNamespace(clip=None))
    context = StepContext(
        0, 1, 1.0, 0, Path(), model, stack, optimizer, objective, roles, runtime,
        lambda micros: Run.total_weight(run, micros), lambda: Run.clip(run),
    )  # fmt: skip
    rows = rows_of(objective, count)
    roles.data = rows
    objective.start(roles)
    micros = next(iter(objective.batches(iter([rows]), roles)))
    assert micro is None or len(micros) >= count // micro
    result = backprop(context, micros)
    return result, {n: p.detach() - before[n] for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_are_one_batch(name: str) -> None:
    whole, moved = update(name, None)
    assert max(float(d.abs().max()) for d in moved.values()) > 1e-4
    for micro in (1, 2, 4):
        parts, piecewise = update(name, micro)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-7)
        assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-9)
        for metric, value in whole.metrics.items():
            assert parts.metrics[metric] == pytest.approx(value, rel=1e-6, abs=1e-9), metric
        for tensor, change in moved.items():
            torch.testing.assert_close(piecewise[tensor], change, atol=1e-10, rtol=1e-8, msg=lambda m, t=tensor: f"{t}: {m}")


# KTO's reference point moves with the policy and sends no gradient: its loss falls otherwise than along its gradient.
@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n != "kto"])
def test_the_logged_loss_is_the_loss_that_is_optimised(name: str) -> None:
    """For a small move along the gradient, the logged loss falls by its squared norm: the number and the gradient belong."""
    result, moved = update(name, 2)
    rate = 1e-4 / float(result.grad_norm or 1.0)
    objective = registry.load("objective", name)()
    model, stack = model_for(objective), Stack([])
    stack.take_reference(model)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_(moved[key], alpha=rate)
    roles = Roles(Engine(model), stack, Tokenizer(), torch.device("cpu"), True)
    if stack.snapshot is not None:
        stack.snapshot = reference_snapshot(objective)
    rows = rows_of(objective)
    roles.data = rows
    objective.start(roles)
    (batch,) = next(iter(objective.batches(iter([rows]), roles)))
    later = float(objective.loss(batch, roles).total.detach()) / objective.weight(batch)
    assert (result.loss - later) / rate == pytest.approx(float(result.grad_norm) ** 2, rel=2e-3)


def reference_snapshot(objective: Any) -> Any:
    stack = Stack([])
    stack.take_reference(model_for(objective))
    return stack.snapshot


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_short_last_step_is_divided_by_its_own_rows(name: str) -> None:
    """A window that is cut off by the end of an epoch: two rows as two micro-batches equal the batch of two."""
    whole, moved = update(name, None, count=2)
    parts, piecewise = update(name, 1, count=2)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-7)
    for tensor, change in moved.items():
        torch.testing.assert_close(piecewise[tensor], change, atol=1e-10, rtol=1e-8)


def test_a_model_is_never_asked_for_its_own_loss() -> None:
    """Families that ignore the number of items train on another scale in silence; here no family is asked."""
    reference, moved = update("sft", 2)
    original = Engine.hidden

    def guarded(self: Engine, batch: Any) -> Any:
        forward = self.model.forward
        self.model.forward = refuse  # type: ignore[method-assign]
        try:
            return original(self, batch)
        finally:
            self.model.forward = forward  # type: ignore[method-assign]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the whole model was called, with whatever loss its family computes")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "hidden", guarded)
        result, again = update("sft", 2)
    assert result.loss == reference.loss
    assert all(torch.equal(again[n], moved[n]) for n in moved)


def test_evaluation_does_not_depend_on_its_batches(tmp_path: Path) -> None:
    """Sums over all rows, divided once, also where the last batch is short."""
    found = []
    for name, words in (("whole", ["batch.size=16"]), ("one", ["batch.size=5", "batch.micro=1"])):
        train_recipe(tmp_path / name, "sft_lora", "steps=0", "eval.batches=null", "data.limit=32", *words)
        found.append(events(tmp_path / name, "evaluation")[0])
    assert {k: v for k, v in found[0].items() if k.startswith("eval/")} == {
        k: pytest.approx(v, rel=1e-5) for k, v in found[1].items() if k.startswith("eval/")
    }
