"""A search finds a planted optimum by every sampler, goes on where it was stopped, and asks nothing twice."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.cli import app
from llmrecipe.core.errors import Interrupted, RecipeError, RunError
from llmrecipe.pipelines.run_stages import Pipeline, Result
from llmrecipe.pipelines.search import study
from llmrecipe.pipelines.search.display import importances
from llmrecipe.pipelines.search.space import grid_points, point_of, point_words
from llmrecipe.pipelines.search.study import Search
from llmrecipe.pipelines.search.trial import Trial
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.pipeline_plan import Planned
from llmrecipe.runs.events import plain

SPACE = "{optim.lr: {low: 1e-5, high: 1e-1, log: true}, batch.size: [2, 4, 8]}"
RECIPE = f"""
defaults: [/sft_lora, _self_]
eval: {{every: 2}}
search: {{space: {SPACE}, trials: 12}}
"""


def loss_of(planned: Planned) -> float:
    """The planted function: its smallest value is 0 at lr 1e-3 and size 4."""
    recipe = planned.composition.recipe  # type: ignore[union-attr]
    return (math.log10(recipe.optim["lr"]) + 3) ** 2 + abs(recipe.batch.size - 4) + 0.25 * recipe.seed


class Lab:
    """Stands in for training: writes the events a run would leave and counts the runs."""

    def __init__(self) -> None:
        self.runs: list[Planned] = []
        self.stop_at: int | None = None
        self.fail_at: int | None = None

    def __call__(self, pipeline: Pipeline, planned: Planned, enough: Any = None) -> Result:
        if (planned.dir / "status.json").is_file() and json.loads((planned.dir / "status.json").read_text())[
            "status"
        ] == "done":
            return Result(planned.name, "reused", 4, "", 0.0, str(planned.dir))
        if len(self.runs) == self.stop_at:
            self.stop_at = None
            raise Interrupted("stopped")
        self.runs.append(planned)
        planned.dir.mkdir(parents=True, exist_ok=True)
        (planned.dir / "recipe.yaml").write_text("{}", encoding="utf-8")
        failed = len(self.runs) - 1 == self.fail_at
        (planned.dir / "status.json").write_text(json.dumps({"status": "failed" if failed else "done"}), encoding="utf-8")
        if failed:
            raise RunError("loss nan")
        lines = []
        for step, more in ((0, 9.0), (2, 1.0), (4, 0.0)):
            loss = plain(loss_of(planned) + more)  # what is not a number is null there
            lines.append(json.dumps({"event": "evaluation", "step": step, "eval/loss": loss}) + "\n")
            (planned.dir / "events.jsonl").write_text("".join(lines), encoding="utf-8")
            if enough is not None and enough():
                return Result(planned.name, "stopped", step, "", 0.0, str(planned.dir))
        return Result(planned.name, "trained", 4, "", 0.0, str(planned.dir))


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(RECIPE, encoding="utf-8")
    found = Lab()
    monkeypatch.setattr(study, "run_stage", found)
    return found


def searched(*words: str) -> tuple[Search, list[Trial]]:
    found = Search("mine", list(words), compose("mine", list(words)))
    found.folder.mkdir(parents=True, exist_ok=True)
    return found, found.run()


@pytest.mark.parametrize(
    ("words", "far"),
    [
        pytest.param(["search.trials=14"], 0.5, marks=pytest.mark.slow),
        pytest.param(["search.sampler=random", "search.trials=14"], 1.5, marks=pytest.mark.slow),
        (["search.sampler=grid", "search.space={optim.lr: [1e-4, 1e-3, 1e-2], batch.size: [2, 4]}"], 1e-12),
    ],
)
def test_the_planted_optimum_is_found(lab: Lab, words: list[str], far: float) -> None:
    found, trials = searched(*words)
    best = found.best(trials)
    assert best.value is not None and best.value < far
    assert best.value == min(t.value for t in trials if t.value is not None)
    path = found.write_best(best, trials)
    recipe = compose(path).recipe
    assert (recipe.optim["lr"], recipe.batch.size) == (best.point["optim.lr"], best.point["batch.size"])
    assert recipe.search is None and recipe.eval.test


def test_a_sweep_is_a_grid_search_with_one_table(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """Values with commas, lists of methods too; the recipe's own space is not searched; the same command goes on."""
    command = ["train", "-m", "recipe=mine", "optim.lr=1e-4,1e-3", "stack=[lora],[lora,bitfit]", "batch.size=4", "seed=1"]
    assert app.run_command(command) == 0
    made = [run.composition.recipe for run in lab.runs]  # type: ignore[union-attr]
    stacks = [["lora"], ["lora", "bitfit"]]
    assert [(r.optim["lr"], list(r.stack)) for r in made] == [(lr, stack) for lr in (1e-4, 1e-3) for stack in stacks]
    shown = capsys.readouterr().out
    assert shown.count("eval/loss") == 1 and shown.count("4 trials in") == 1
    best = compose(shown.strip().splitlines()[-1].removeprefix("done: ")).recipe
    assert (best.optim["lr"], best.batch.size, best.seed, best.search) == (1e-3, 4, 1, None)
    assert app.run_command(command) == 0 and len(lab.runs) == 4


def test_each_sweep_has_a_folder_of_its_own(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr("llmrecipe.cli.search.run_search", lambda recipe, words, *_: given.append(words))
    for words in (["seed=1,2"], ["seed=1,2"], ["seed=1,3"], ["seed=1,2", "run.dir=here"]):
        assert app.run_command(["train", "-m", "recipe=mine", *words]) == 0
    folders = [compose("mine", words).recipe.run.dir for words in given]
    assert folders[0] == folders[1] != folders[2] and str(folders[0]).startswith("runs/mine-sweep-") and folders[3] == "here"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "recipe=mine", "optim.lr=1e-3"], "no word lists several values"),
        (["-m", "recipe=mine,other", "optim.lr=1e-3,1e-4"], "a sweep is over values of one recipe"),
        (["-m", "recipe=mine", "optim.lr=1e-3,1e-4", "resume=auto"], "repeat the same command"),
        (["-m", "recipe=mine", "optim.lr=interval(0,1)"], "a grid needs its values one by one"),
        (["-m", "recipe=mine", "optim.lr=1,2", "optim.lr=3,4"], "optim.lr is swept twice"),
        (["-m", "recipe=mine", "optim.lr=1e-3,fast"], "search.space.optim.lr: 'fast'"),
        (["-m", "recipe=mine", "optim.lr=1e-3,1e-4", "data.path=rows.jsonl"], "a search needs a validation split"),
        (["recipe=mine", "optim.lr=1e-3,1e-4"], "to train with each of them write `llmrecipe train -m ... optim.lr=1e-3,1e-4`"),
    ],
)
def test_what_is_no_sweep_says_what_to_write(lab: Lab, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert app.run_command(["train", *words]) == 2 and lab.runs == []
    assert said in capsys.readouterr().err


def test_a_stopped_search_goes_on_to_the_same_trials_and_runs_nothing_twice(lab: Lab) -> None:
    _, whole = searched("run.dir=whole", "search.trials=6")
    lab.runs.clear()
    lab.stop_at = 3
    with pytest.raises(Interrupted):
        searched("run.dir=stopped", "search.trials=6")
    journal = Path("stopped/trials.jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    journal.write_text("".join(lines[:3]) + lines[3][:20])  # as a kill in the middle of a line leaves it
    _, again = searched("run.dir=stopped", "search.trials=6")
    assert [(t.point, t.values) for t in again] == [(t.point, t.values) for t in whole]
    assert len(lab.runs) == 6
    _, more = searched("run.dir=stopped", "search.trials=7")
    assert more[:6] == again and len(lab.runs) == 7
    with pytest.raises(RunError, match="another space"):
        searched("run.dir=stopped", "search.space={batch.size: [2, 4]}")
    with pytest.raises(RunError, match="another space"):
        searched("run.dir=stopped", "steps=7")


def test_a_trial_is_worth_the_mean_over_its_seeds_and_never_opens_the_test_split(lab: Lab) -> None:
    found, trials = searched("search={space: {batch.size: [2, 4]}, sampler: grid, seeds: [0, 2, 4]}", "optim.lr=1e-3")
    assert [t.values for t in trials] == [[2.0, 2.5, 3.0], [0.0, 0.5, 1.0]]
    assert [(t.value, t.spread) for t in trials] == [(2.5, 0.5), (0.5, 0.5)]
    assert found.best(trials).point == {"batch.size": 4}
    recipes = [p.composition.recipe for p in lab.runs]  # type: ignore[union-attr]
    assert not any(r.eval.test for r in recipes) and [r.seed for r in recipes] == [0, 2, 4, 0, 2, 4]


@pytest.mark.slow
def test_trials_that_are_behind_are_stopped_and_do_not_win(lab: Lab) -> None:
    words = ["search.prune=median", "search.trials=12", "search.sampler=random"]
    found, trials = searched("run.dir=a", *words)
    pruned = [t for t in trials if t.state == "pruned"]
    assert pruned and all(list(t.reports) == [2] for t in pruned)
    done = {t.number: t.value for t in trials if t.state == "done"}
    assert found.best(trials).value == min(done.values())
    # The median rule by hand: behind the median of what earlier trials reported at this step, from the sixth trial on.
    for trial in trials:
        finished = sorted(t.reports[2] for t in trials[: trial.number] if t.state == "done")
        if trial.number >= 5 and len(finished) >= 5:
            half = len(finished) // 2
            median = finished[half] if len(finished) % 2 else (finished[half - 1] + finished[half]) / 2
            assert (trial.state == "pruned") == (trial.reports[2] > median)
    lab.stop_at = len(lab.runs) + 8
    with pytest.raises(Interrupted):
        searched("run.dir=b", *words)
    _, again = searched("run.dir=b", *words)
    assert [(t.point, t.state) for t in again] == [(t.point, t.state) for t in trials]


@pytest.mark.slow
def test_halving_knows_the_rungs_of_earlier_trials_after_a_stop(lab: Lab) -> None:
    words = ["search.prune=halving", "search.trials=10", "search.sampler=random"]
    _, whole = searched("run.dir=a", *words)
    assert any(t.state == "pruned" for t in whole) and any(t.rungs for t in whole)
    lab.stop_at = len(lab.runs) + 5
    with pytest.raises(Interrupted):
        searched("run.dir=b", *words)
    _, again = searched("run.dir=b", *words)
    assert [(t.point, t.state, t.rungs) for t in again] == [(t.point, t.state, t.rungs) for t in whole]


def test_a_trial_that_fails_is_told_and_the_search_goes_on(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.fail_at = 1
    found, trials = searched("search.trials=4")
    assert [t.state for t in trials] == ["done", "failed", "done", "done"]
    assert "trial 1 failed: loss nan" in capsys.readouterr().err
    assert found.best(trials).number != 1


def test_a_score_that_is_not_a_number_never_wins(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as the first trial, nor before a later sampler; an evaluation without a number is no better than none."""
    real = loss_of
    nan = float("nan")
    monkeypatch.setitem(globals(), "loss_of", lambda p: nan if p.composition.recipe.batch.size == 2 else real(p))  # type: ignore[union-attr]
    found, trials = searched("search={space: {batch.size: [2, 4, 8]}, sampler: grid}", "optim.lr=1e-3")
    assert [t.state for t in trials] == ["failed", "done", "done"] and found.best(trials).point == {"batch.size": 4}
    monkeypatch.setattr(Search, "_curve", lambda self, planned: [(0, nan), (2, 1.5), (4, nan)])
    planned = found.planned("0", found.trial_composition({"batch.size": 4}, 0))
    assert found._value(planned) == 1.5
    monkeypatch.setattr(found, "evaluation", found.evaluation.model_copy(update={"load_best": False}))
    assert math.isnan(found._value(planned))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["search.space={optim.lrr: [1, 2]}"], "search.space.optim.lrr: 1: optim.lrr: adamw has no option"),
        (["search.space={batch.size: [2, two]}"], "search.space.batch.size: 'two': batch.size: must be a whole number"),
        (["search.space={optim.lr: {low: -1.0, high: 1e-3}}"], "search.space.optim.lr: -1.0: optim.lr: must be"),
        (["search.space={optim.lr: {low: 1e-3, high: 1e-5}}"], "a range whose low (0.001) is below its high"),
        (["search.space={optim.lr: {low: 0, high: 1e-5, log: true}}"], "a range above 0"),
        (["search.space={}"], "names nothing to try"),
        (["search.space={batch.size: []}"], "the list of values is empty"),
        (["search.sampler=gird"], "did you mean 'grid'?"),
        (["search.sampler=grid"], "search.space.optim.lr: a grid needs a list of values or a range with a step"),
        (["search.prune=median", "eval.every=null"], "set eval.every"),
        (["search=null"], "says nothing to try"),
    ],
)  # fmt: skip
def test_a_search_that_cannot_be_run_is_told_before_the_first_trial(lab: Lab, words: list[str], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Search("mine", words, compose("mine", words)).check()
    assert told in str(caught.value)
    assert lab.runs == []


def test_nested_and_dotted_keys_are_the_same_space(lab: Lab) -> None:
    words = ["search.space={optim: {lr: {low: 1e-5, high: 1e-1}}, batch: {size: [2]}}", "search.space.optim.lr.log=true"]
    space = compose("mine", words).recipe.search.space  # type: ignore[union-attr]
    assert list(space) == ["optim.lr", "batch.size"]
    assert (space["optim.lr"].low, space["optim.lr"].log, space["batch.size"]) == (1e-5, True, [2])


def test_points_of_a_space(lab: Lab) -> None:
    section = compose("mine", ["search.space={steps: {low: 2, high: 7, step: 2}, optim.lr: {low: 0.1, high: 0.3, step: 0.1}}"])
    points = grid_points(section.recipe.search)  # type: ignore[arg-type]
    assert [p["steps"] for p in points] == [2, 2, 2, 4, 4, 4, 6, 6, 6]
    assert [p["optim.lr"] for p in points[:3]] == pytest.approx([0.1, 0.2, 0.3])
    own = compose("mine").recipe.search
    point = point_of(own, {"optim.lr": 0.000123456789, "batch.size": 2})  # type: ignore[arg-type]
    assert point == {"optim.lr": 0.000123457, "batch.size": 8}
    assert point_words({"stack": ["lora"], "optim.lr": 1e-3}) == ['stack=["lora"]', "optim.lr=0.001"]


@pytest.mark.slow
def test_a_real_search_leaves_a_recipe_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space = "search={space: {optim.lr: [1e-6, 5e-3]}, sampler: grid}"
    small = ["steps=6", "data.limit=16", "batch.size=4", "eval.batches=1", "log.live=off", "eval.test=false"]
    assert app.run_command(["search", "recipe=sft_lora", space, *small]) == 0
    folder = Path("runs/sft_lora-search")
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()[1:]]
    values = {t["point"]["optim.lr"]: t["values"][0] for t in trials}
    assert values[5e-3] < values[1e-6] - 0.5  # one of the rates learns, the other does not move
    assert compose(folder / "searched.yaml").recipe.optim["lr"] == 5e-3
    assert (folder / "search.png").stat().st_size > 1000
    assert app.run_command(["train", f"recipe={folder}/searched.yaml", "run.dir=best", "log.live=off"]) == 0
    final = json.loads(Path("best/final/metrics.json").read_text())
    assert final["eval/loss"] == pytest.approx(values[5e-3], abs=1e-6)


LITTLE = "steps: 1, data: {limit: 8}, batch: {size: 2}, eval: {every: 1, batches: 1, test: false}"
SPACE_OF_ONE = "search: {space: {optim.lr: [1e-5]}, sampler: grid, prune: off}"
SUPERVISED = {
    "search": (["search"], f"{{defaults: [/sft_lora, _self_], {LITTLE}, {SPACE_OF_ONE}}}"),
    "step": (["step", "search"], f"{{defaults: [/sft_lora, _self_], {LITTLE}, {SPACE_OF_ONE}}}"),
    "pipeline": (["train"], f"stages: {{sft: {{recipe: sft_lora, {LITTLE}}}}}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SUPERVISED)
def test_what_supervises_stays_small(kind: str, tmp_path: Path) -> None:
    """A process that only starts trainings and waits loads no torch: it takes a fraction of what each training takes."""
    words, text = SUPERVISED[kind]
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    code = (
        "import re, resource, sys\n"
        "from llmrecipe.cli.app import run_command\n"
        f"assert run_command({[*words, 'recipe=r.yaml', 'log.live=off']!r}) == 0\n"
        # VmHWM, because the peak that getrusage tells of a process itself begins with its parent's.
        "own = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "peak = [own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]\n"
        "assert 'torch' not in sys.modules and peak[0] < 0.4 * peak[1], peak\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


class Crowd(Lab):
    """A lab whose runs, up to the `last`, wait for two others; counts how many go on at once, and can stop one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.started = self.broken_at = -1
        self.last = 0
        self.lock = threading.Lock()

    def __call__(self, pipeline: Pipeline, planned: Planned, enough: Any = None) -> Result:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.started += 1
            place = self.started
        waited = time.monotonic() + 10.0
        while self.now < 3 and place < self.last and time.monotonic() < waited:
            time.sleep(0.01)
        try:
            if place == self.broken_at:
                raise Interrupted("stopped")
            with self.lock:
                return super().__call__(pipeline, planned, enough)
        finally:
            with self.lock:
                self.now -= 1


@pytest.fixture
def crowd(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Crowd:
    found = Crowd()
    monkeypatch.setattr(study, "run_stage", found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["random", pytest.param("tpe", marks=pytest.mark.slow)])
def test_trials_that_run_at_once_are_those_of_a_search_that_was_stopped(crowd: Crowd, sampler: str) -> None:
    words = ["search.parallel=3", "search.trials=7", f"search.sampler={sampler}"]
    crowd.last = 6
    _, whole = searched("run.dir=whole", *words)
    assert crowd.most == 3 and [t.number for t in whole] == list(range(7)) and len(crowd.runs) == 7
    crowd.runs.clear()
    crowd.started, crowd.broken_at, crowd.last = -1, 4, 0
    with pytest.raises(Interrupted):
        searched("run.dir=stopped", *words)
    kept = len(Path("stopped/trials.jsonl").read_text().splitlines()) - 1
    assert kept in (3, 4, 5)
    crowd.broken_at = -1
    _, again = searched("run.dir=stopped", *words)
    assert [(t.point, t.values) for t in again] == [(t.point, t.values) for t in whole] and len(crowd.runs) == 7
    with pytest.raises(RunError, match="another space"):
        searched("run.dir=stopped", *words, "search.parallel=2")


@pytest.mark.slow
def test_a_round_knows_earlier_rounds_and_not_its_own(crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    """TPE follows results from its eleventh trial on: those of a trial change what comes after its round, not its round."""
    words = ["search.parallel=4", "search.trials=20", "search.sampler=tpe"]
    _, one = searched("run.dir=one", *words)
    original = study.Search._value

    def other(found: Search, planned: Planned) -> float:
        return original(found, planned) - (50.0 if planned.name == "12" else 0.0)

    monkeypatch.setattr(study.Search, "_value", other)
    _, two = searched("run.dir=two", *words)
    points = [[t.point for t in trials] for trials in (one, two)]
    assert points[0][:16] == points[1][:16] and points[0][16:] != points[1][16:]


def test_the_same_point_twice_in_a_round_is_one_run(crowd: Crowd) -> None:
    point = {"optim.lr": 1e-3, "batch.size": 2}
    space = "{optim.lr: [1e-3, 1e-2], batch.size: [2]}"
    start = "[{optim.lr: 1e-3, batch.size: 2}, {optim.lr: 1e-3, batch.size: 2}]"
    words = [f"search.space={space}", f"search.start={start}", "search.trials=2", "search.parallel=2", "search.sampler=random"]
    _, trials = searched("run.dir=twice", *words)
    assert [t.point for t in trials] == [point, point] and len(crowd.runs) == 1
    assert trials[0].dirs == trials[1].dirs and trials[0].values == trials[1].values


def test_a_stepwise_search_decides_a_key_before_the_next_one(crowd: Crowd) -> None:
    words = ["search.sampler=stepwise", "search.samples=2", "search.space={batch.size: [2, 4], optim.lr: [1e-3, 1e-2, 1e-4]}"]
    _, one = searched("run.dir=one", *words)
    _, at_once = searched("run.dir=many", *words, "search.parallel=3")
    assert [t.point for t in at_once] == [t.point for t in one]


def test_trials_of_several_processes_run_one_by_one(lab: Lab) -> None:
    words = ["search.parallel=2", "runtime.processes=2"]
    with pytest.raises(RecipeError, match=r"search\.parallel: each trial has several processes"):
        Search("mine", words, compose("mine", words)).check()


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_key_that_decides_is_the_important_one(lab: Lab, mode: str) -> None:
    """A planted score: the rate decides, the batch does not."""
    words = ["search.sampler=random", "search.trials=30", f"eval.mode={mode}"]
    found = Search("mine", words, compose("mine", words))
    chance = random.Random(0)
    trials = []
    for number in range(30):
        point = {"optim.lr": 10 ** chance.uniform(-4, -1), "batch.size": chance.choice([2, 4, 8])}
        loss = abs(math.log10(point["optim.lr"]) + 2.5)
        trials.append(Trial(number, point, [loss if mode == "min" else -loss]))
    shares = importances(found, trials)
    assert list(shares) == ["optim.lr", "batch.size"] and sum(shares.values()) == pytest.approx(1.0)
    assert shares["optim.lr"] > 0.8
    assert importances(found, trials[:9]) == {}
