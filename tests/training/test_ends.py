"""The end of a run: killed at any file-system call of it, a resume leaves what the run that was never killed leaves."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmrecipe.core.errors import RunError
from llmrecipe.recipe.compose import compose
from llmrecipe.runs.checkpoint_io import rotate, save_checkpoint, steps
from llmrecipe.runs.run_dir import RunDir
from llmrecipe.training import run as run_module
from llmrecipe.training import save_run
from llmrecipe.training.evaluate import Evaluation
from llmrecipe.training.run import Run
from llmrecipe.training.train import train
from tests.trainings import learned, resume, train_recipe

SHORT = [
    "steps=3", "batch.size=1", "data.limit=3", "eval.every=1", "eval.at_start=false", "save.every=2", "save.end=false",
    "data.packing=off",
]  # fmt: skip
LOSSES = {1: 1.0, 2: 2.0, 3: 3.0}
"""The run gets worse: its best weights are those of step 1."""
CALLS = ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir")
"""Every call that changes a file's name, its durability or a folder."""


class Killed(BaseException):
    """The process is gone: no handler of an error may run."""


@contextlib.contextmanager
def killed_at(moment: int) -> Iterator[list[str]]:
    """Inside, the call of that number since the end of training began raises `Killed`; yields the names of the calls made."""
    made: list[str] = []
    begun: list[bool] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if begun:
                made.append(name)
                if len(made) >= moment:
                    raise Killed(name)
            return function(*arguments, **named)

        return call

    original = save_run.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_run, "finish", lambda run: (begun.append(True), original(run)))
        for name in CALLS:
            patch.setattr(os, name, counted(name, getattr(os, name)))
        yield made


def left(folder: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """What a finished run left: its learned tensors and its metrics."""
    tensors = {name: t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in learned(folder).items()}
    return tensors, json.loads((folder / "final" / "metrics.json").read_text())


def dies(moment: int, folder: Path) -> list[str]:
    """Resume a run that is killed at that call of its end; the calls made, all of them where it came through."""
    with killed_at(moment) as made, contextlib.suppress(Killed):
        resume(folder)
    gc.collect()  # the lock of the dead process goes with its file
    return made


def told(evaluation: Evaluation, data: Any) -> dict[str, float]:
    """An evaluation."""
    return {"loss": LOSSES[evaluation.step]}


@pytest.fixture(autouse=True)
def getting_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "evaluate", told)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(a run that was killed when its last step was made, what it leaves where it is not)."""
    tmp_path = tmp_path_factory.mktemp("ended")
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(run_module, "evaluate", told)
        train_recipe(tmp_path / "whole", "sft_lora", *SHORT)
        patch.setattr(Run, "finish", lambda run: (_ for _ in ()).throw(Killed()))
        train_recipe(tmp_path / "template", "sft_lora", *SHORT)
    gc.collect()
    assert steps(tmp_path / "template" / "checkpoints") == [2] and steps(tmp_path / "template" / "best") == [1]
    wanted = left(tmp_path / "whole")
    assert wanted[1] == {"steps": 3, "best_step": 1, "eval/loss": 1.0}
    return tmp_path / "template", wanted


@pytest.fixture
def at_the_end(ended: tuple[Path, Any], tmp_path: Path) -> tuple[Path, Any]:
    """A copy of `ended`."""
    shutil.copytree(ended[0], tmp_path / "template")
    return tmp_path / "template", ended[1]


def ends_as_it_should(template: Path, folder: Path, moment: int, wanted: Any) -> list[str]:
    """Kill at one call, go on, and compare; the calls made before death."""
    shutil.copytree(template, folder)
    made = dies(moment, folder)
    if RunDir.open(folder, write=False).read_status()["status"] != "done":
        resume(folder)
        assert not [p.name for p in folder.iterdir() if p.name.startswith(".") or p.name == "best"]
    assert left(folder) == wanted, f"killed at call {moment} ({made[-1]})"
    assert RunDir.open(folder, write=False).read_status()["status"] == "done"
    shutil.rmtree(folder)
    return made


@pytest.mark.slow
def test_a_kill_where_states_change_hands(at_the_end: tuple[Path, Any], tmp_path: Path) -> None:
    template, wanted = at_the_end
    shutil.copytree(template, tmp_path / "whole_end")
    made = dies(10**6, tmp_path / "whole_end")
    # final/ gets its name, then status.json says done, then best/ loses its name and its files.
    named, done, gone = made.index("rename"), made.index("replace"), len(made) - made[::-1].index("rename") - 1
    assert named < done < gone and "unlink" not in made[:gone] and "rmdir" not in made[:gone]
    assert made.count("fsync") > 5 and "fsync" in made[named:done] and "fsync" in made[done:gone]
    for moment in (done + 1, gone + 2):
        ends_as_it_should(template, tmp_path / "run", moment, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["first", "over an older final"])
def test_a_kill_at_every_call_of_the_end(at_the_end: tuple[Path, Any], tmp_path: Path, again: bool) -> None:
    template, wanted = at_the_end
    if again:
        (template / "final").mkdir()
        (template / "final" / "metrics.json").write_text("{}")
    moment = 1
    while len(ends_as_it_should(template, tmp_path / "run", moment, wanted)) >= moment:
        moment += 1
    assert moment > 20


def test_best_weights_that_are_gone_are_not_replaced_by_the_last(at_the_end: tuple[Path, Any]) -> None:
    template, _ = at_the_end
    shutil.rmtree(template / "best")
    with pytest.raises(RunError, match=r"eval\.load_best: the best weights so far, those of step 1, are not in .*best"):
        resume(template)
    run = train(compose(template / "recipe.yaml", ["eval.load_best=false"]), template)
    assert json.loads((template / "final" / "metrics.json").read_text())["best_step"] == 3
    assert all(torch.equal(v, learned(template)[k]) for k, v in run.stack.delta(run.model).items())


@pytest.mark.slow
def test_a_newer_best_is_kept_beside_the_one_a_checkpoint_returns_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after step 3 became the best, the run goes on from step 2, whose best is step 1."""
    monkeypatch.setitem(LOSSES, 3, 0.5)
    monkeypatch.setitem(LOSSES, 4, 3.0)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        original = Run.evaluate

        def evaluate(run: Run) -> bool:
            if run.progress.step == 4:
                raise Killed
            return original(run)

        patch.setattr(Run, "evaluate", evaluate)
        train_recipe(tmp_path / "run", "sft_lora", *SHORT, "steps=4", "save.keep=1", "save.every=2")
    gc.collect()
    assert steps(tmp_path / "run" / "checkpoints") == [2] and steps(tmp_path / "run" / "best") == [1, 3]
    # Evaluations are another's from now on: step 3 is no longer better than step 1.
    monkeypatch.setitem(LOSSES, 3, 2.5)
    resume(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "final" / "metrics.json").read_text())["best_step"] == 1
    assert not (tmp_path / "run" / "best").exists()


def test_only_bests_that_nothing_returns_to_are_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path / "best", step, {}, {})
    save_checkpoint(tmp_path / "checkpoints", 2, {}, {"judge": {"best_step": 1}})
    save_checkpoint(tmp_path / "checkpoints", 3, {}, {"judge": {"best_step": 3}})
    run: Any = SimpleNamespace(dir=SimpleNamespace(path=tmp_path), best=SimpleNamespace(best_step=4))
    save_run.forget_worse(run)
    assert steps(tmp_path / "best") == [1, 3, 4]
    rotate(tmp_path / "checkpoints", keep=1)
    save_run.forget_worse(run)
    assert steps(tmp_path / "best") == [3, 4]


@pytest.mark.parametrize("recipe", ["sft_lora", "sft"])
def test_every_file_of_a_finished_model_has_the_permissions_of_the_umask(recipe: str, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        train_recipe(tmp_path, recipe, *SHORT, "steps=1", "eval.every=null", "save.every=null")
    finally:
        os.umask(before)
    files = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "final").rglob("*") if path.is_file()}
    assert len(files) > 4 and set(files.values()) == {"0o640"}, files
