"""Pipelines run: each stage once, reused afterwards, continued after a kill, nothing before everything is checked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.cli import app
from llmrecipe.core.errors import Interrupted, LlmRecipeError, ModelError, RecipeError, RunError
from llmrecipe.pipelines import run_stages
from llmrecipe.pipelines.subprocesses import Child, Machine
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.pipeline_plan import Planned, plan
from llmrecipe.training.train import train
from tests.trainings import curve, events

TINY = "data: {limit: 20}, batch: {size: 4}, eval: {batches: 1, test: false}"
TWO = f"""
stages:
  sft: {{recipe: sft_lora, steps: 2, stack: {{lora: {{r: 2}}}}, {TINY}}}
  dpo: {{recipe: dpo_lora, with: ["model.path=${{stage:sft}}"], steps: 2, stack: {{lora: {{r: 2}}}}, {TINY}}}
"""


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A pipeline of two tiny stages in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.yaml").write_text(TWO, encoding="utf-8")
    return "two.yaml"


def run(name: str, *words: str) -> list[run_stages.Result]:
    return run_stages.run_all_stages(compose(name, list(words)))


def test_two_stages_once_and_only_what_changed_again(two: str, started: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    first = run(two)
    assert started == ["sft", "dpo"]
    assert [(r.stage, r.how, r.steps) for r in first] == [("sft", "trained", 2), ("dpo", "trained", 2)]
    assert all("eval/loss" in r.metric and " -> " in r.metric for r in first)
    # The reference of the second stage is what the first one left: at step 0 the loss is log 2 on the adapted model.
    check = events(Path(first[1].dir), "check")[0]
    assert check["loss"] == pytest.approx(0.6931, abs=1e-3)
    saved = (Path(first[1].dir) / "final" / "stack.yaml").read_text()
    assert saved.count("kind: lora") == 2
    capsys.readouterr()

    second = run(two)
    assert started == ["sft", "dpo"]
    assert [(r.how, r.dir) for r in second] == [("reused", r.dir) for r in first]
    assert "[sft] reused:" in capsys.readouterr().out

    third = run(two, "stages.dpo.objective.beta=0.3")
    assert started == ["sft", "dpo", "dpo"]
    assert third[0].dir == first[0].dir and third[1].dir != first[1].dir


def test_a_mistake_in_a_later_stage_is_found_before_the_first_starts(two: str, started: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"stages\.dpo: optim\.lrr.*did you mean 'lr'"):
        run(two, "stages.dpo.optim.lrr=1")
    with pytest.raises(ModelError, match=r"stages\.dpo: stack\.lora: target 'attn\.z' matches nothing"):
        run(two, "stages.dpo.stack.lora.target=attn.z")
    assert started == [] and not Path("runs").exists()


def test_a_stage_that_stopped_before_a_checkpoint_begins_again(two: str, started: list[str]) -> None:
    made = plan(compose(two))
    folder = made["sft"].dir
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("{}", encoding="utf-8")
    (folder / "status.json").write_text('{"status": "running"}', encoding="utf-8")
    (folder / "events.jsonl").write_text('{"event": "step", "step": 1, "loss": 99.0}\n', encoding="utf-8")
    assert [r.how for r in run(two)] == ["trained", "trained"]
    assert [e["step"] for e in events(folder)] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "error", "told"),
    [
        (2, RunError, "its message stands above"),
        (130, Interrupted, "goes on"),
        (-9, RunError, "SIGKILL (the system ends processes this way when memory runs out)"),
        (1, LlmRecipeError, "exit code 1"),
        (0, LlmRecipeError, "exit code 0"),
    ],
)
def test_the_end_of_a_stage_is_told_with_the_way_on(
    two: str, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception], told: str
) -> None:
    monkeypatch.setattr(run_stages, "execute", lambda *_: code)
    monkeypatch.setattr(run_stages, "check_stages", lambda made: {})
    with pytest.raises(error) as caught:
        run(two, "stages.sft.steps=1")
    assert told in str(caught.value) and "stage sft" in str(caught.value)
    assert code in (0, 1) or ("llmrecipe train recipe=" in str(caught.value) and "stages.sft.steps=1" in str(caught.value))


def test_a_recipe_changed_on_the_way_is_not_run_under_the_old_key(two: str, monkeypatch: pytest.MonkeyPatch) -> None:
    project = Path("recipes")
    project.mkdir()
    (project / "mine.yaml").write_text("steps: 1\n", encoding="utf-8")
    Path("two.yaml").write_text("stages: {a: {recipe: mine}}\n", encoding="utf-8")
    monkeypatch.setattr(
        run_stages, "check_stages", lambda made: (project / "mine.yaml").write_text("steps: 2\n", encoding="utf-8")
    )
    with pytest.raises(RunError, match="was changed after the pipeline had begun"):
        run(two)


def test_train_itself_refuses_a_pipeline_and_check_tells_every_stage(two: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError, match="is a pipeline"):
        train(compose(two))
    assert app.run_command(["check", f"recipe={two}", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {name: facts["steps"] for name, facts in found.items()} == {"sft": 2, "dpo": 2}


# --- at the same time -------------------------------------------------------------------------------------------------

THREE = f"""
stages:
  one: {{recipe: sft_lora, steps: 2, {TINY}}}
  two: {{recipe: sft_lora, steps: 3, {TINY}}}
  last: {{recipe: dpo_lora, with: ["model.path=${{stage:one}}"], steps: 2, {TINY}}}
"""


def finish(planned: Planned) -> None:
    """Leave what a finished training leaves."""
    (planned.dir / "final").mkdir(parents=True)
    (planned.dir / "recipe.yaml").write_text("{}", encoding="utf-8")
    (planned.dir / "status.json").write_text('{"status": "done"}', encoding="utf-8")
    (planned.dir / "events.jsonl").write_text('{"event": "step", "step": 2, "loss": 1.0}\n', encoding="utf-8")


@pytest.fixture
def three(two: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A pipeline whose first two stages do not need each other; nothing is checked."""
    Path("three.yaml").write_text(THREE, encoding="utf-8")
    monkeypatch.setattr(run_stages, "check_stages", lambda made: {})
    return "three.yaml"


def test_stages_that_do_not_need_each_other_run_at_once(three: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)
    order: list[str] = []
    told: dict[str, dict[str, str]] = {}

    def here(child: Child, planned: Planned, continued: bool) -> int:
        told[planned.name] = child.environment
        if planned.name != "last":
            both.wait(timeout=30)  # breaks unless both are here
        order.append(planned.name)
        finish(planned)
        return 0

    monkeypatch.setattr(run_stages, "execute", here)
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, slots: cls(slots, ("3", "5"), 8)))
    results = run(three, "run.parallel=2")
    assert [r.stage for r in results] == ["one", "two", "last"] and order[-1] == "last"
    assert {told["one"]["CUDA_VISIBLE_DEVICES"], told["two"]["CUDA_VISIBLE_DEVICES"]} == {"3", "5"}
    assert all(int(t["OMP_NUM_THREADS"]) <= 4 for t in told.values())


def test_one_at_a_time_unless_asked(three: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"now": 0, "most": 0}

    def execute(child: Child, planned: Planned, continued: bool) -> int:
        here["now"] += 1
        here["most"] = max(here["most"], here["now"])
        time.sleep(0.05)
        here["now"] -= 1
        assert child.environment == {}
        finish(planned)
        return 0

    monkeypatch.setattr(run_stages, "execute", execute)
    assert len(run(three)) == 3 and here["most"] == 1


@pytest.mark.parametrize("by_user", [False, True])
def test_what_stops_one_stage_stops_those_beside_it(three: str, monkeypatch: pytest.MonkeyPatch, by_user: bool) -> None:
    both, started, asked = threading.Barrier(2), [], []

    def execute(child: Child, planned: Planned, continued: bool) -> int:
        started.append(planned.name)
        both.wait(timeout=30)
        if planned.name == "one" and not by_user:
            return 2
        if planned.name == "one":
            os.kill(os.getpid(), signal.SIGINT)
        end = time.monotonic() + 30
        while child.signal is None and time.monotonic() < end:
            time.sleep(0.01)
        asked.append((planned.name, child.signal))
        return 130

    monkeypatch.setattr(run_stages, "execute", execute)
    with pytest.raises(Interrupted if by_user else RunError, match="stopped in stage" if by_user else "stage one stopped"):
        run(three, "run.parallel=2")
    assert sorted(started) == ["one", "two"]
    number = signal.SIGINT if by_user else signal.SIGTERM
    assert sorted(asked) == [(name, number) for name in (["one", "two"] if by_user else ["two"])]


@pytest.mark.parametrize(("wrong", "ran", "message"), [
    (["one"], ["one", "two"], "stage one stopped"),
    (["one", "two"], ["one", "two"], "2 stages failed; 1 need them"),
])  # fmt: skip
def test_what_does_not_need_a_failed_stage_goes_on(
    three: str, monkeypatch: pytest.MonkeyPatch, wrong: list[str], ran: list[str], message: str
) -> None:
    """The stage that needs both never starts; the same command runs only what is left."""
    started: list[str] = []

    def execute(child: Child, planned: Planned, continued: bool) -> int:
        started.append(planned.name)
        if planned.name in wrong:
            return 2
        finish(planned)
        return 0

    monkeypatch.setattr(run_stages, "execute", execute)
    with pytest.raises(RunError, match=message) as error:
        run(three, "run.keep_going=true")
    assert started == ran and "run.keep_going=true" in str(error.value)
    wrong.clear()
    started.clear()
    how = {r.stage: r.how for r in run(three, "run.keep_going=true")}
    assert [name for name, word in how.items() if word != "reused"] == started and started[-1] == "last"


def test_a_stop_ends_all_whatever_goes_on(three: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_stages, "execute", lambda child, planned, continued: 130)
    with pytest.raises(Interrupted, match="stopped in stage one"):
        run(three, "run.keep_going=true")


@pytest.mark.parametrize(
    ("slots", "devices", "cores", "taken", "wanted"),
    [
        (2, ("0", "1", "2", "3"), 16, (1,), {"OMP_NUM_THREADS": "8", "CUDA_VISIBLE_DEVICES": "2,3"}),
        (2, ("0", "1", "2", "3"), 16, (0, 1), {"OMP_NUM_THREADS": "16", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}),
        (3, ("7",), 2, (2,), {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "7"}),
        (3, (), 12, (0,), {"OMP_NUM_THREADS": "4"}),
        (1, ("0", "1"), 12, (0,), {}),
    ],
)
def test_places_share_the_machine(
    slots: int, devices: tuple[str, ...], cores: int, taken: tuple[int, ...], wanted: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Machine(slots, devices, cores).environment(taken) == wanted


def test_a_stage_of_several_processes_takes_the_places_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(2, ("0", "1", "2", "3"), 8)
    assert [machine.needed(n) for n in (1, 2, 3, 4, 9)] == [1, 1, 2, 2, 2]
    assert [Machine(4, (), 8).needed(n) for n in (1, 2, 9)] == [1, 2, 4]


# --- real processes ---------------------------------------------------------------------------------------------------

LONG = ["stages.sft.steps=30", "stages.sft.save.every=2"]


def begin(*words: str) -> subprocess.Popen[str]:
    """`llmrecipe train` on the pipeline, in the working directory."""
    command = [sys.executable, "-m", "llmrecipe", "train", "recipe=two.yaml", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for(find: Callable[[], Any], what: str, seconds: float = 240) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := find():
            return found
        time.sleep(0.05)
    raise AssertionError(f"no {what} after {seconds} s")


def checkpoints() -> list[Path]:
    return sorted(Path("runs/two").glob("sft-*/checkpoints/step-*/"))


@pytest.mark.faults
def test_a_stage_that_is_killed_or_stopped_goes_on_where_it_was(two: str) -> None:
    killed = begin(*LONG)
    folder = wait_for(checkpoints, "checkpoint")[0].parent.parent
    os.kill(json.loads((folder / "status.json").read_text())["process"], signal.SIGKILL)
    told, _ = killed.communicate(timeout=120)
    assert killed.returncode == 2 and "SIGKILL" in told and "goes on" in told
    step = checkpoints()[-1].name

    stopped = begin(*LONG)
    wait_for(lambda: checkpoints()[-1].name > step, "later checkpoint")
    stopped.send_signal(signal.SIGTERM)
    told, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 130 and "stopped in stage sft" in told and "recipe=two.yaml" in told
    assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"

    last = begin(*LONG)
    told, _ = last.communicate(timeout=400)
    assert last.returncode == 0, told
    assert "[sft] continued:" in told and "[dpo] done:" in told and "done: runs/two/dpo-" in told
    whole = Path("whole")
    composed = plan(compose(two, LONG))["sft"]
    train(compose("sft_lora", [*composed.words, f"run.dir={whole}", "log.live=off"]))
    assert curve(folder) == curve(whole)
