"""Evaluating a finished run: it is the weights the run left that are scored, on the rows that are said."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrecipe.evaluation.evaluate_model import evaluate_path
from tests.trainings import events, train_recipe

FEW = ["steps=3", "data.limit=24", "batch.size=8", "eval.load_best=false", "optim.lr=1e-2"]


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("mlm", ["model.config.hidden_size=32", "model.config.num_hidden_layers=1"]),
        ("clm", ["model.init=random", "model.config.num_hidden_layers=1"]),
        ("sft_lora", ["model.init=random"]),
        ("clm", []),
    ],
    ids=["config of its own", "tiny from fresh weights", "an adapter on fresh weights", "pretrained"],
)
def test_what_a_run_left_is_scored_as_the_run_scored_it(recipe: str, words: list[str], tmp_path: Path) -> None:
    """However the base was made: the evaluation after the last step is that of the run's folder, and not that of step 0."""
    folder = tmp_path / "run"
    train_recipe(folder, recipe, *words, *FEW)
    first, *_, last = events(folder, "evaluation")
    found = evaluate_path(str(folder), ["data.cache=false"])
    assert found["loss"] == pytest.approx(last["eval/loss"], rel=1e-6)
    assert abs(found["loss"] - first["eval/loss"]) > 1e-3
    some = evaluate_path(str(folder), ["data.cache=false", "eval.batches=1"])
    assert found["rows"] > some["rows"] == 8
    assert evaluate_path(str(folder / "final"), ["data.cache=false"]) == found
