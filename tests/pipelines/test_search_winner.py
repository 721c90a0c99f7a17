"""The best trial of a search: its learning rate for its batch size, the interval of its score, and its last training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.cli import app
from llmrecipe.core.errors import Interrupted, RecipeError, RunError
from llmrecipe.pipelines.run_stages import Pipeline, Result
from llmrecipe.pipelines.search import study, winner
from llmrecipe.pipelines.search.study import Search, search
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.pipeline_plan import Planned
from llmrecipe.runs.looks import read_looks
from tests.pipelines.test_search import Lab, searched

GRID = "search={space: {batch.size: [2, 8, 32]}, sampler: grid}"
BEST_STEP, STEPS = 3, 4


class Leaving(Lab):
    """A lab whose runs leave a length and a best step, and whose last training leaves a test score."""

    def __call__(self, pipeline: Pipeline, planned: Planned, enough: Any = None) -> Result:
        result = super().__call__(pipeline, planned, enough)
        (planned.dir / "final").mkdir(exist_ok=True)
        (planned.dir / "report.json").write_text(json.dumps({"steps": STEPS}))
        tested = {"test/loss": 1.5} if planned.composition.recipe.eval.test else {}  # type: ignore[union-attr]
        (planned.dir / "final" / "metrics.json").write_text(json.dumps({"best_step": BEST_STEP, **tested}))
        return result


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    text = "defaults: [/sft_lora, _self_]\neval: {every: 2}\nbatch: {size: 8}\noptim: {lr: 1e-3}\nseed: 0\n"
    (tmp_path / "recipes" / "mine.yaml").write_text(text, encoding="utf-8")
    found = Leaving()
    monkeypatch.setattr(study, "run_stage", found)
    monkeypatch.setattr(winner, "run_stage", found)
    monkeypatch.setattr(winner, "row_interval", lambda *_: None)
    monkeypatch.setattr(study, "row_interval", lambda *_: None)
    return found


def recipes(lab: Lab) -> list[Any]:
    return [run.composition.recipe for run in lab.runs]  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scaling", "rates"),
    [("off", [1e-3, 1e-3, 1e-3]), ("sqrt", [0.5e-3, 1e-3, 2e-3]), ("linear", [0.25e-3, 1e-3, 4e-3])],
)
def test_the_learning_rate_of_a_trial_grows_with_its_batch(lab: Lab, scaling: str, rates: list[float]) -> None:
    """By hand, from batches of 8: a quarter of the rows halves the rate (sqrt) or quarters it (linear)."""
    found, trials = searched(GRID, f"search.lr_scaling={scaling}")
    assert [r.optim["lr"] for r in recipes(lab)] == rates
    assert [t.point for t in trials] == [{"batch.size": 2}, {"batch.size": 8}, {"batch.size": 32}]
    written = compose(found.write_best(trials[0], trials)).recipe
    assert (written.optim["lr"], written.batch.size) == (rates[0], 2)


def test_a_searched_rate_is_that_of_the_recipe_s_batch_size(lab: Lab) -> None:
    space = "search={space: {optim.lr: [1e-4, 1e-2], batch.size: [2, 8]}, sampler: grid, lr_scaling: sqrt}"
    found, trials = searched(space)
    assert [r.optim["lr"] for r in recipes(lab)] == [0.5e-4, 1e-4, 0.5e-2, 1e-2]
    assert found.best(trials).point["optim.lr"] == 1e-2
    with pytest.raises(RecipeError, match=r"search.lr_scaling: .* add batch.size to search.space"):
        Search("mine", words := ["search={space: {optim.lr: [1e-4]}, lr_scaling: linear}"], compose("mine", words)).check()


def test_a_journal_without_the_new_keys_goes_on(lab: Lab) -> None:
    searched(GRID)
    head = json.loads(Path("runs/mine-search/trials.jsonl").read_text().splitlines()[0])
    assert not {"final", "lr_scaling"} & set(head["search"])
    searched(GRID, "search.final=true")
    assert len(lab.runs) == 3
    with pytest.raises(RunError, match="another space"):
        searched(GRID, "search.lr_scaling=sqrt")


@pytest.mark.slow
def test_the_best_point_is_trained_on_both_splits_and_scored_once(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """Trials leave the test split alone; a stopped last training goes on; the same command trains nothing again."""
    lab.stop_at = 3
    with pytest.raises(Interrupted):
        search("mine", [GRID, "steps=40", "search.final=true", "eval.patience=2", "eval.monitor=eval/loss"])
    words = [GRID, "steps=40", "search.final=true", "eval.patience=2", "eval.monitor=eval/loss"]
    found, trials = search("mine", words)
    *tried, last = recipes(lab)
    assert [(r.data.train_on, r.eval.test, r.steps) for r in tried] == [("train", False, 40)] * 3
    # best after 3 of 4 steps
    assert (last.data.train_on, last.eval.test, last.steps, last.eval.patience) == ("train+validation", True, 30, None)
    assert last.batch.size == found.best(trials).point["batch.size"]
    assert found.final is not None and (found.final.test, found.final.looks) == ({"test/loss": 1.5}, 1)
    again, _ = search("mine", words)
    assert again.final == found.final and len(lab.runs) == 4
    assert compose(found.folder / "searched.yaml").recipe.data.train_on == "train"
    capsys.readouterr()
    assert app.run_command(["search", "recipe=mine", *words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["final"] == {"dir": found.final.dir, "test": {"test/loss": 1.5}, "looks": 1}


@pytest.mark.slow
def test_passes_are_shortened_and_a_second_winner_is_a_second_look(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    space = "search={space: {batch.size: [8, 32]}, sampler: random, start: [{batch.size: 32}, {batch.size: 8}], final: true}"
    search("mine", [space, "search.trials=1", "steps=null", "epochs=2"])
    assert (recipes(lab)[-1].batch.size, recipes(lab)[-1].epochs) == (32, 1.5)
    assert "winners" not in capsys.readouterr().err
    found, _ = search("mine", [space, "search.trials=2", "steps=null", "epochs=2"])
    assert recipes(lab)[-1].batch.size == 8 and found.final is not None and found.final.looks == 2
    assert "2 winners of this search were scored" in capsys.readouterr().err


def test_a_last_training_that_cannot_be_is_told_before_the_first_trial(lab: Lab) -> None:
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    words = [GRID, "search.final=true", "data.path=rows.jsonl", "data.validation=0.3"]
    with pytest.raises(RecipeError, match=r"search.final: there is no test split"):
        Search("mine", words, compose("mine", words)).check()
    assert not lab.runs


@pytest.mark.slow
def test_a_real_search_ends_with_a_tested_model_and_an_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"{word} day {i}", "label": word} for i in range(40) for word in ("good", "bad")]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    space = "search={space: {optim.lr: [1e-6, 5e-3]}, sampler: grid, final: true}"
    small = ["data.path=rows.jsonl", "data.validation=0.2", "data.test=0.2", "steps=6", "eval.every=3", "batch.size=8"]
    command = ["search", "recipe=classify", space, *small, "log.live=off", "run.dir=here", "--json"]
    assert app.run_command(command) == 0
    printed = json.loads(capsys.readouterr().out)
    best = printed["best"]
    low, high = printed["interval"]
    assert low < best["values"][0] < high and best["point"] == {"optim.lr": 5e-3}
    assert f"[{low:.6g}, {high:.6g}]" in Path("here/searched.yaml").read_text()
    assert app.run_command(["eval", best["dirs"][0], "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)["metrics"]
    assert (scored["accuracy"], scored["accuracy/low"], scored["accuracy/high"]) == (best["values"][0], low, high)
    final = Path(printed["final"]["dir"])
    report, tried = (json.loads((run / "report.json").read_text()) for run in (final, Path(best["dirs"][0])))
    assert tried["data"]["kept"] < report["data"]["kept"] < len(rows)
    assert [len(read_looks(run)) for run in (final, *map(Path, best["dirs"]))] == [1, 0]
    assert printed["final"]["test"]["test/accuracy"] >= 0.0
    assert app.run_command(command) == 0
    assert json.loads(capsys.readouterr().out) == printed and len(read_looks(final)) == 1
