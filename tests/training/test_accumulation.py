"""One denominator a step, whatever a family or an evaluation does; the promise itself is tests/objectives/contract.py's."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.core.console import Pace
from llmrecipe.engine.forward import Engine
from llmrecipe.training.run import Run
from tests.objectives.harness import update
from tests.trainings import events, learned, train_recipe


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
        train_recipe(tmp_path / name, "sft_lora", "steps=1", "eval.batches=null", "data.limit=32", *words)
        found.append(events(tmp_path / name, "evaluation")[0])
    assert {k: v for k, v in found[0].items() if k.startswith("eval/")} == {
        k: pytest.approx(v, rel=1e-5) for k, v in found[1].items() if k.startswith("eval/")
    }


@pytest.mark.parametrize("recipe", ["sft_lora", "classify"])
def test_a_run_with_evaluations_ends_with_the_weights_of_one_without(recipe: str, tmp_path: Path) -> None:
    """To the bit under dropout, with answers that are generated, and with early stopping that does not stop."""
    drops = {"sft_lora": ["stack.lora.dropout=0.2", "eval.metrics=[exact_match]", "eval.samples=1", "eval.max_new_tokens=3"]}
    words = ["steps=3", "batch.size=4", "data.limit=12", "eval.load_best=false", "eval.batches=1"]
    often = ["eval.every=1", "eval.patience=3", *drops.get(recipe, [])]
    never = ["eval.at_start=false", "eval.test=false", *(w for w in drops.get(recipe, []) if w.startswith("stack"))]
    train_recipe(tmp_path / "with", recipe, *words, *often)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "due_evaluation", lambda *_, **__: False)
        train_recipe(tmp_path / "without", recipe, *words, *never)
    assert len(events(tmp_path / "with", "evaluation")) == 4 and not events(tmp_path / "without", "evaluation")
    ours, theirs = learned(tmp_path / "with"), learned(tmp_path / "without")
    assert ours and ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_long_evaluation_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llmrecipe.training.evaluate.Pace", functools.partial(Pace, every=0.0))
    words = ["steps=1", "eval.batches=2", "eval.test=false", "batch.size=3", "batch.micro=2", "data.packing=off"]
    train_recipe(tmp_path / "run", "sft_lora", *words)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluating")]
    assert lines[:3] == [f"evaluating, rows: {n} of 6" for n in (0, 2, 4)]
