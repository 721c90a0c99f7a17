"""Evaluating a finished run: it is the weights the run left that are scored, on the rows that are said."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrecipe.evaluation.evaluate_model import evaluate_path
from llmrecipe.evaluation.evaluate_runs import score_runs
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


def test_a_run_a_folder_of_runs_and_a_plain_model_get_the_same_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One set of weights by three paths: every metric, text metrics and intervals included; no interval without its score."""
    run = tmp_path / "runs" / "a"
    train_recipe(run, "sft", *FEW, "model.config.num_hidden_layers=1", "model.init=random", "eval.batches=1", "eval.test=false")
    words = ["data.cache=false", "data.limit=4", "eval.batches=1", "eval.metrics=[exact_match]", "eval.max_new_tokens=4"]
    own = evaluate_path(str(run), words)
    assert {"loss", "accuracy", "exact_match", "perplexity", "nll/low", "exact_match/high"} <= set(own)
    assert score_runs(str(tmp_path / "runs"), words, "validation") == [{"run": str(run), **own}]
    assert "data.validation" not in capsys.readouterr().err
    evaluate_path(str(run), ["data.path=builtin:sft", "data.validation=0.5", *words])
    assert "scored: the 50% of data.path that data.validation holds out" in capsys.readouterr().err
    plain = evaluate_path(
        str(run / "final" / "model"), ["data.path=builtin:sft", "data.max_length=256", "batch.size=8", *words]
    )
    assert plain == pytest.approx(own)
    texts = evaluate_path(str(run), ["objective=clm", "data.path=builtin:stories", *words[:3]])
    assert {"bits_per_byte", "byte_perplexity", "word_perplexity"} <= set(texts)
    assert all(name.rpartition("/")[0] in texts for name in texts if name.endswith(("/low", "/high")))
