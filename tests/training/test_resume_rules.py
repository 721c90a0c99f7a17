"""What a resume may change, where a finished run goes on, and that events.jsonl has every event once."""

from __future__ import annotations

import contextlib
import gc
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.cli.app import run_command as command_line
from llmrecipe.core.errors import RunError
from llmrecipe.recipe.compose import compose
from llmrecipe.runs.checkpoint_io import steps
from llmrecipe.runs.events import Events, read_events
from llmrecipe.runs.run_dir import RunDir
from llmrecipe.training import run as run_module
from llmrecipe.training import save_run
from llmrecipe.training.run import Run
from llmrecipe.training.train import train
from tests.support import shared
from tests.trainings import learned, resume, train_recipe

SHORT = ["batch.size=2", "data.limit=6", "eval.every=2", "eval.batches=1", "schedule=constant", "schedule.warmup=0"]
RL = ["batch.size=2", "objective.answers=2", "objective.max_new_tokens=3", "data.limit=6", "eval.batches=1", "eval.every=2"]
UNSTEADY = ("_per_s", "_mb", "seconds")


class Killed(BaseException):
    """The process is gone: no handler of an error may run."""


def log(folder: Path) -> list[dict[str, Any]]:
    """All events without times and memory."""
    return [{k: v for k, v in e.items() if not k.endswith(UNSTEADY)} for e in read_events(folder)]


def more(folder: Path, *overrides: str) -> Run:
    """Continue a run under overrides."""
    return train(compose(folder / "recipe.yaml", list(overrides)), folder)


def test_a_finished_run_goes_on_from_its_end_as_if_it_had_never_ended(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_recipe(whole, "sft_lora", *SHORT, "steps=6")
    train_recipe(parts, "sft_lora", *SHORT, "steps=4")
    run = more(parts, "steps=6", "log.every=1")
    assert run.first_step == 4 and log(parts) == log(whole)
    ours, theirs = learned(parts), learned(whole)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert RunDir.open(parts, write=False).recipe()["steps"] == 6
    assert more(parts, "steps=8", "log.every=2").first_step == 6
    assert resume_of(parts) == (8, 2), "what one resume changed, the next one keeps"


def resume_of(folder: Path) -> tuple[int, int]:
    recipe = RunDir.open(folder, write=False).recipe()
    return recipe["steps"], recipe["log"]["every"]


def test_the_case_of_the_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    case = shared("cases", "resume-finished-run-more-steps")
    shutil.copytree(case, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    recipe, *commands = (tmp_path / "cmd.txt").read_text().splitlines()
    for line in commands:
        words = shlex.split(line.replace("$R", shlex.split(recipe.removeprefix("R="))[0]))
        monkeypatch.setattr(sys, "argv", words)
        assert command_line(words[1:]) == 0
    assert [e["step"] for e in read_events(tmp_path / "r_a", "step")] == [1, 2, 3, 4, 5, 6]
    assert RunDir.open("r_a", write=False).recipe()["steps"] == 6
    assert (tmp_path / "r_a/command.txt").read_text().splitlines()[1] == "llmrecipe train resume=r_a steps=6"
    assert "resume changes steps: 2 -> 6" in capsys.readouterr().out
    assert command_line(["train", "resume=r_a"]) == 2
    assert "is finished: it ended at step 6; steps=MORE" in capsys.readouterr().err


def test_a_finished_run_without_a_checkpoint_of_its_end_is_not_trained_again(tmp_path: Path) -> None:
    train_recipe(tmp_path / "run", "sft_lora", *SHORT, "steps=2", "save.end=false", "eval.at_start=false")
    before = (tmp_path / "run" / "events.jsonl").read_bytes()
    with pytest.raises(RunError, match=r"finished at step 2 and has no checkpoint, .* model\.path="):
        more(tmp_path / "run", "steps=4")
    save = RunDir.open(tmp_path / "run", write=False).path / "checkpoints" / "step-000001"
    assert not save.exists() and (tmp_path / "run" / "events.jsonl").read_bytes() == before
    assert RunDir.open(tmp_path / "run", write=False).read_status()["status"] == "done"
    shutil.rmtree(tmp_path / "run" / "final")
    with pytest.raises(RunError, match=r"ended at step 2 and its result, .*final, is gone; put it back, or delete .*run and"):
        more(tmp_path / "run")


def test_an_old_final_is_kept_until_the_new_one_is_whole_and_best_weights_outlive_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {2: 1.0, 4: 2.0, 6: 3.0}
    monkeypatch.setattr(run_module, "evaluate", lambda evaluation, data: {"loss": losses[evaluation.step]})
    train_recipe(tmp_path / "run", "sft_lora", *SHORT, "eval.at_start=false", "steps=4")
    best = learned(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "final" / "metrics.json").read_text())["best_step"] == 2

    def die(run: Run, metrics: dict[str, Any], documents: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(save_run, "write_final", die)
        more(tmp_path / "run", "steps=6")
    gc.collect()
    assert steps(tmp_path / "run" / "checkpoints") == [4, 6]
    assert all(torch.equal(v, best[k]) for k, v in learned(tmp_path / "run").items())
    resume(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "final" / "metrics.json").read_text()) == {
        "steps": 6,
        "best_step": 2,
        "eval/loss": 1.0,
    }
    assert all(torch.equal(v, best[k]) for k, v in learned(tmp_path / "run").items())


def test_a_run_that_stopped_early_stays_stopped_until_its_end_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "evaluate", lambda evaluation, data: {"loss": float(evaluation.step)})
    options = [*SHORT, "eval.at_start=false", "eval.patience=1", "eval.load_best=false", "steps=8"]
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Run, "finish", lambda run: (_ for _ in ()).throw(Killed()))
        train_recipe(tmp_path / "run", "sft_lora", *options)
    gc.collect()
    assert resume(tmp_path / "run").progress.step == 4
    with pytest.raises(RunError, match="it ended at step 4"):
        more(tmp_path / "run", "log.every=2")
    assert more(tmp_path / "run", "eval.patience=null").progress.step == 8


def test_fewer_steps_than_made_are_refused(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Run, "finish", lambda run: (_ for _ in ()).throw(Killed()))
        train_recipe(tmp_path / "run", "sft_lora", *SHORT, "steps=4")
    gc.collect()
    with pytest.raises(RunError, match="has a checkpoint of step 4 already; steps=3 is less"):
        more(tmp_path / "run", "steps=3")


def killed(at: str, number: int, folder: Path, recipe: str, *options: str) -> None:
    """Train, or continue, until the call of that number of a method of `Events` or of `save_checkpoint` has been made."""
    made = 0

    def counted(original: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal made
            result = original(*arguments, **named)
            made += 1
            if made == number:
                raise Killed
            return result

        return call

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        where: Any = save_run if hasattr(save_run, at) else Events
        patch.setattr(where, at, counted(getattr(where, at)))
        train_recipe(folder, recipe, *options)
    gc.collect()  # the lock of the dead process goes with its file


OFTEN = [*SHORT, "steps=4", "eval.samples=1", "eval.max_new_tokens=2", "save.every=2", "save.keep=4"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The events of the run that was never killed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_recipe(folder, "sft_lora", *OFTEN)
    return log(folder)


MORE = [("step", 3), ("step", 2), ("evaluation", 1), ("evaluation", 2), ("sample", 2), ("save", 1)]


@pytest.mark.parametrize(
    ("at", "number"), [("save_checkpoint", 2), ("step", 1), *(pytest.param(*m, marks=pytest.mark.slow) for m in MORE)]
)
def test_each_event_is_there_once_whenever_a_run_was_killed(
    at: str, number: int, tmp_path: Path, whole: list[dict[str, Any]]
) -> None:
    killed(at, number, tmp_path / "run", "sft_lora", *OFTEN)
    status = RunDir.open(tmp_path / "run", write=False).read_status()
    assert status["status"] == "interrupted" and status["step"] == len(read_events(tmp_path / "run", "step"))
    resume(tmp_path / "run")
    assert log(tmp_path / "run") == whole


@pytest.mark.parametrize("number", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_samples_of_rl_are_there_once(number: int, tmp_path: Path) -> None:
    options = [*RL, "steps=4", "save.every=2"]
    train_recipe(tmp_path / "whole", "grpo", *options)
    killed("sample", number, tmp_path / "run", "grpo", *options)
    resume(tmp_path / "run")
    assert log(tmp_path / "run") == log(tmp_path / "whole")
    assert [e["event"] for e in log(tmp_path / "whole")].count("sample") >= 4


def test_a_checkpoint_without_a_count_of_lines_keeps_the_events_of_its_steps(tmp_path: Path) -> None:
    """As one written before checkpoints had it."""
    events = Events(tmp_path, live="off")
    for step in (1, 2, 3):
        events.step(step, loss=1.0)
    events.close()
    events = Events(tmp_path, live="off")
    events.resume(2, saved="checkpoints/step-000002")
    events.close()
    assert [(e["event"], e["step"]) for e in read_events(tmp_path)] == [("step", 1), ("step", 2)]


def test_a_damaged_line_stops_no_resume_no_report_and_no_comparison(tmp_path: Path, caplog: Any, capsys: Any) -> None:
    train_recipe(tmp_path / "run", "sft_lora", *SHORT, "steps=2")
    path = tmp_path / "run" / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert b'"step": 1,' in lines[-3]
    for wrong in (
        b'{"event": "step", "st\n',
        b"\x00\x00\xff\n",
        b"[1]\n",
        b'{"event": "step", "step": "two"}\n',
        b"[" * 5000 + b"\n",
    ):
        path.write_bytes(b"".join([*lines[:-3], wrong, *lines[-2:]]))
        caplog.clear()
        assert len(read_events(tmp_path / "run")) == len(lines) - 1
        assert "this line is not an event; it is left out" in caplog.text
    capsys.readouterr()
    assert command_line(["compare", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"]["run"]["steps"] == 2
    assert command_line(["report", str(tmp_path / "run"), "--json"]) == 0
    more(tmp_path / "run", "steps=3")
    assert [e["step"] for e in read_events(tmp_path / "run", "step")] == [2, 3]
    assert (tmp_path / "run" / "events.damaged").read_bytes() == wrong
    assert any("1 damaged line was set aside" in e["message"] for e in read_events(tmp_path / "run", "warning"))
