"""The best checkpoint: judged by hand, put back at the end, and patience."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.recipe.schema import EvalSection
from llmrecipe.training import run as run_module
from llmrecipe.training.best import BestTracker
from llmrecipe.training.evaluate import Evaluation
from tests.trainings import events, learned, resume, stop_after, train_recipe

SHORT = ["steps=6", "batch.size=4", "data.limit=12", "eval.every=2", "eval.at_start=false"]
STACKS = {
    "lora": ["sft_lora"],
    "everything": ["sft"],
    "biases": ["sft", "stack=[bitfit]", "stack.bitfit.missing=add_zero"],
    "prefix": ["prefix_tuning", "stack.prefix_tuning.reparam=flat"],
}


def test_the_best_tracker_by_hand() -> None:
    tracker = BestTracker(EvalSection(min_delta=0.1, patience=2), "min")
    verdicts = [tracker.see(step, {"eval/loss": value}) for step, value in enumerate([2.0, 1.95, 1.5, float("nan"), 1.45])]
    assert [v.best for v in verdicts] == [True, False, True, False, False]
    assert [v.stop for v in verdicts] == [False, False, False, False, True]
    assert (tracker.best, tracker.best_step) == (1.5, 2)
    upward = BestTracker(EvalSection(monitor="eval/accuracy"), "max")
    assert [upward.see(i, {"eval/accuracy": v}).best for i, v in enumerate([0.2, 0.1, 0.2, 0.3])] == [True, False, False, True]


def test_patience_begins_after_the_warm_up_and_a_resumed_run_keeps_the_count() -> None:
    section = EvalSection(patience=2, warmup=3)
    tracker, verdicts = BestTracker(section, "min"), []
    for step, value in enumerate([1.0, 2.0, 2.0, 2.0, 0.5, 2.0, 2.0]):
        verdicts.append(tracker.see(step, {"eval/loss": value}))
        kept = tracker.state()
        tracker = BestTracker(section, "min")
        assert tracker.load_state(kept)
    # The first three are not counted, the fourth is one, the fifth the best; two more and it stops.
    assert [v.stop for v in verdicts] == [False] * 6 + [True] and tracker.best_step == 4
    plain = BestTracker(EvalSection(patience=2), "min")
    assert [plain.see(step, {"eval/loss": value}).stop for step, value in enumerate([1.0, 2.0, 2.0])] == [False, False, True]


def told(values: list[float], kept: dict[int, dict[str, torch.Tensor]]) -> Any:
    """An evaluation that gives these values in turn and remembers what was learned at each."""
    script = iter(values)

    def evaluate(evaluation: Evaluation, data: Any) -> dict[str, float]:
        roles = evaluation.roles
        kept[evaluation.step] = {k: v.detach().clone() for k, v in roles.stack.delta(roles.model).items()}
        return {"loss": next(script)}

    return evaluate


@pytest.mark.parametrize("name", STACKS)
def test_a_run_that_gets_worse_ends_with_its_best_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[int, dict[str, torch.Tensor]] = {}
    monkeypatch.setattr(run_module, "evaluate", told([1.0, 2.0, 3.0], kept))
    recipe, *options = STACKS[name]
    run = train_recipe(tmp_path / "run", recipe, *SHORT, *options)
    assert json.loads((tmp_path / "run" / "final" / "metrics.json").read_text())["best_step"] == 2
    now = run.stack.delta(run.model)
    assert all(torch.equal(now[k], v) for k, v in kept[2].items())
    assert any(not torch.equal(now[k], v) for k, v in kept[6].items())
    saved = learned(tmp_path / "run")
    shared = [k for k in kept[2] if k in saved]
    assert shared and all(torch.equal(saved[k], kept[2][k]) for k in shared)


def test_the_last_weights_stay_where_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[int, dict[str, torch.Tensor]] = {}
    monkeypatch.setattr(run_module, "evaluate", told([1.0, 2.0, 3.0], kept))
    train_recipe(tmp_path / "run", "sft_lora", *SHORT, "eval.load_best=false")
    assert all(torch.equal(learned(tmp_path / "run")[k], v) for k, v in kept[6].items())


def test_patience_ends_the_run_at_the_evaluation_that_exhausts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[int, dict[str, torch.Tensor]] = {}
    monkeypatch.setattr(run_module, "evaluate", told([1.0, 2.0, 3.0, 0.0], kept))
    run = train_recipe(tmp_path / "run", "sft_lora", *SHORT, "steps=20", "eval.patience=2")
    assert run.progress.step == 6 and sorted(kept) == [2, 4, 6]
    assert all(torch.equal(learned(tmp_path / "run")[k], v) for k, v in kept[2].items())


def test_the_best_survives_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[int, dict[str, torch.Tensor]] = {}
    monkeypatch.setattr(run_module, "evaluate", told([1.0, 2.0, 3.0], kept))
    stop_after(4, tmp_path / "run", "sft_lora", *SHORT)
    resume(tmp_path / "run")
    assert [e["step"] for e in events(tmp_path / "run", "evaluation")] == [2, 4, 6]
    assert all(torch.equal(learned(tmp_path / "run")[k], v) for k, v in kept[2].items())
