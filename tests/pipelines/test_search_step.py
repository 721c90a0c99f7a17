"""`search` as a stage: it leaves the best trial's run, goes on where it was stopped, and is checked before the first stage."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmrecipe.cli import app
from llmrecipe.core.errors import Interrupted, RecipeError
from llmrecipe.pipelines import run_stages
from llmrecipe.pipelines.steps.run_step import run_step
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.pipeline_plan import for_check, plan
from llmrecipe.recipe.step_spec import compose_step
from llmrecipe.runs.run_record import read_run
from tests.pipelines.test_search import Lab, lab

__all__ = ["lab"]
WORDS = ["recipe=mine", 'words=["search.trials=5"]', "log.live=off"]
PIPELINE = """
stages:
  sft: {recipe: sft_lora, with: [steps=3, data.limit=16]}
  tuned: {kind: search, recipe: mine, words: ["model.path=${stage:sft}", search.trials=2]}
  dpo: {recipe: dpo_lora, with: ["model.path=${stage:tuned}"]}
  seen: {kind: leaderboard, runs: ["${stage:tuned}"], metric: eval/loss}
"""


def searched(*words: str) -> Path:
    return run_step(compose_step("search", [*WORDS, *words])).path


def test_it_leaves_the_run_of_the_best_trial(lab: Lab) -> None:
    folder = searched("run.dir=found")
    trials = [json.loads(line) for line in (folder / "trials" / "trials.jsonl").read_text().splitlines()[1:]]
    best = min(trials, key=lambda trial: trial["values"][0])
    assert len(trials) == 5 and (folder / "best").resolve() == Path(best["dirs"][0]).resolve()
    metrics = json.loads((folder / "final" / "metrics.json").read_text())
    point = {f"best/{key}": value for key, value in best["point"].items()}
    assert metrics == {"eval/loss": best["values"][0], "trials": 5, **point}
    assert compose(folder / "trials" / "searched.yaml").recipe.optim["lr"] == best["point"]["optim.lr"]
    moved = folder.rename("elsewhere")
    assert (moved / "best" / "recipe.yaml").is_file()


@pytest.mark.slow
def test_the_seed_of_the_stage_is_that_of_its_trials(lab: Lab) -> None:
    searched("run.dir=found", "seed=7")
    assert [p.composition.recipe.seed for p in lab.runs] == [7] * 5  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_stopped_search_goes_on_and_runs_nothing_twice(lab: Lab) -> None:
    whole = searched("run.dir=whole")
    lab.runs.clear()
    lab.stop_at = 2
    with pytest.raises(Interrupted):
        searched("run.dir=stopped")
    assert json.loads(Path("stopped/status.json").read_text())["status"] == "interrupted"
    assert not Path("stopped/best").exists()
    again = searched("run.dir=stopped")
    names = [{p.name for p in (folder / "trials").iterdir()} for folder in (whole, again)]
    assert names[0] == names[1] and len(lab.runs) == 5
    assert (again / "best").readlink() == (whole / "best").readlink()
    assert searched("run.dir=stopped") == again and len(lab.runs) == 5


def test_another_recipe_under_the_same_name_is_another_result(lab: Lab) -> None:
    first = compose_step("search", WORDS).dir
    assert compose_step("search", WORDS).dir == first
    path = Path("recipes/mine.yaml")
    path.write_text(path.read_text(encoding="utf-8") + "steps: 7\n", encoding="utf-8")
    assert compose_step("search", WORDS).dir != first


def test_stages_behind_it_take_the_best_run_and_are_checked_on_its_base(lab: Lab) -> None:
    Path("recipes/pipe.yaml").write_text(PIPELINE, encoding="utf-8")
    made = plan(compose("pipe"))
    assert [s.name for s in made.stages] == ["sft", "tuned", "dpo", "seen"]
    best = str(made["tuned"].dir / "best")
    assert made["dpo"].words[0] == f"model.path={best}"
    assert made["dpo"].composition.recipe.model.path == best  # type: ignore[union-attr]
    assert made["seen"].composition.options["runs"] == [best]  # type: ignore[union-attr]
    assert f"model.path={made['sft'].dir}" in made["tuned"].composition.options["words"]  # type: ignore[union-attr]
    assert for_check(made, set())["dpo"].recipe.model.path == "tiny"  # type: ignore[union-attr]
    assert set(run_stages.check_stages(made)) == {"sft", "tuned", "dpo", "seen"}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ("recipe: min,", r"stages.tuned.recipe=min: there is no recipe of that name .*did you mean 'mine'"),
        ("recipe: sft_lora,", "search.space: names nothing to try"),
        ("recipe: mine, word: [],", "search has no option 'word'; did you mean 'words'"),
        ("recipe: mine, with: [steps=3],", "a step has no key 'with'"),
    ],
)
def test_what_cannot_be_searched_is_told_before_the_first_stage(lab: Lab, changed: str, told: str) -> None:
    Path("recipes/pipe.yaml").write_text(PIPELINE.replace("recipe: mine,", changed), encoding="utf-8")
    with pytest.raises(RecipeError, match=told):
        run_stages.check_stages(plan(compose("pipe")))
    assert not lab.runs


def test_a_value_no_trial_can_have_is_told_before_the_first_stage(lab: Lab) -> None:
    wrong = PIPELINE.replace("search.trials=2", "'search.space={batch.size: [0, 4]}'")
    Path("recipes/pipe.yaml").write_text(wrong, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"search.space.batch.size: 0: batch.size: must be > 0"):
        run_stages.check_stages(plan(compose("pipe")))


@pytest.mark.faults
def test_a_pipeline_killed_inside_its_search_goes_on_from_the_trials_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real command line, stopped while the second trial runs: the first is kept, and the last stage trains on the best."""
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/small.yaml").write_text(
        "defaults: [/sft_lora, _self_]\n"
        "steps: 3\n"
        "eval: {every: 3, batches: 1}\n"
        "search: {space: {optim.lr: [1e-5, 1e-2]}, sampler: grid, prune: off}\n"
    )
    small = "[data.limit=8, batch.size=2]"
    Path("recipes/pipe.yaml").write_text(
        "stages:\n"
        f"  tuned: {{kind: search, recipe: small, words: {small}}}\n"
        "  more: {recipe: small, data: {limit: 8}, batch: {size: 2}, eval: {test: false}, "
        'with: ["model.path=${stage:tuned}", search=null]}\n'
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "llmrecipe", "train", "recipe=pipe"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    journal = Path("runs/pipe")
    until = time.time() + 500
    while time.time() < until and process.poll() is None:
        if any(len(p.read_text().splitlines()) == 2 for p in journal.glob("tuned-*/trials/trials.jsonl")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    (folder,) = journal.glob("tuned-*")
    assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
    first = (folder / "trials" / "trials.jsonl").read_text().splitlines()
    kept = Path(json.loads(first[1])["dirs"][0])
    stamp = (kept / "events.jsonl").stat().st_mtime_ns

    assert app.run_command(["train", "recipe=pipe"]) == 0
    capsys.readouterr()
    lines = (folder / "trials" / "trials.jsonl").read_text().splitlines()
    assert lines[:2] == first[:2] and len(lines) == 3
    assert (kept / "events.jsonl").stat().st_mtime_ns == stamp
    worth = {Path(trial["dirs"][0]).name: trial["values"][0] for trial in map(json.loads, lines[1:])}
    assert (folder / "best").resolve().name == min(worth, key=worth.__getitem__)
    (more,) = journal.glob("more-*")
    # The stage behind it starts where the best trial ended.
    assert read_run(more).curve("eval/loss")[0][1] == pytest.approx(min(worth.values()), rel=1e-5)
    assert app.run_command(["train", "recipe=pipe"]) == 0
    assert capsys.readouterr().out.count("reused") >= 2
