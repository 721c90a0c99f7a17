"""A run that was stopped and continued is the run that was never stopped, bit for bit."""

from __future__ import annotations

import errno
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmrecipe.core.errors import RunError
from llmrecipe.recipe.compose import compose
from llmrecipe.runs.checksums import write_checksums
from llmrecipe.runs.events import Events
from llmrecipe.training.train import train
from tests.trainings import QUIET, curve, events, learned, resume, stop_after, train_recipe

# Ten rows in batches of four: three steps an epoch, the last of two rows; eight steps end in the third epoch.
SHORT = ["steps=8", "batch.size=4", "batch.micro=2", "data.limit=10"]
STACKS = {
    "lora with dropout": ["sft_lora", "stack.lora.dropout=0.2"],
    "everything": ["sft"],
    "bitfit": ["sft", "stack=[bitfit]", "stack.bitfit.missing=add_zero"],
    "mezo": ["mezo"],
    "rows across documents": ["clm", "data.blocks=true", "data.max_length=16"],
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("bitfit", "lora with dropout") else n for n in STACKS]
)
@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_stopping_at_any_step_changes_nothing(name: str, step: int, tmp_path: Path) -> None:
    recipe, *options = STACKS[name]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_recipe(whole, recipe, *SHORT, *options)
    stop_after(step, parts, recipe, *SHORT, *options)
    assert json.loads((parts / "status.json").read_text())["status"] == "interrupted"
    resume(parts)
    assert json.loads((parts / "status.json").read_text())["status"] == "done"
    assert curve(parts) == curve(whole)
    assert [e["step"] for e in events(parts)] == list(range(1, 9))
    ours, theirs = learned(parts), learned(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.slow
def test_dpo_keeps_its_reference_over_a_stop(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    short = ["steps=6", "batch.size=4", "data.limit=10"]
    for recipe in ("dpo_lora", "dpo"):
        train_recipe(whole / recipe, recipe, *short)
        stop_after(4, parts / recipe, recipe, *short, number=signal.SIGINT)
        resume(parts / recipe)
        assert curve(parts / recipe) == curve(whole / recipe)


@pytest.mark.slow
def test_two_interruptions_are_as_good_as_none(tmp_path: Path) -> None:
    train_recipe(tmp_path / "whole", "sft_lora", *SHORT)
    stop_after(3, tmp_path / "parts", "sft_lora", *SHORT, "save.every=2")
    original = curve(tmp_path / "parts")
    assert [step for step, *_ in original] == [1, 2, 3]
    # The newest checkpoint is lost: the run goes back to the one before it and its later events are written anew.
    newest = tmp_path / "parts" / "checkpoints" / "step-000003" / "delta.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    resume(tmp_path / "parts")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_a_changed_recipe_is_refused_and_shown(tmp_path: Path) -> None:
    stop_after(2, tmp_path / "run", "sft_lora", *SHORT)
    changed = compose(tmp_path / "run" / "recipe.yaml", ["stack.lora.alpha=3.0"])
    with pytest.raises(RunError, match="stack") as caught:
        train(changed, tmp_path / "run")
    assert "3.0" in str(caught.value)
    longer = train(compose(tmp_path / "run" / "recipe.yaml", ["save.keep=1"]), tmp_path / "run")
    assert longer.progress.step == 8


def test_evaluating_changes_nothing(tmp_path: Path) -> None:
    options = [*SHORT, "stack.lora.dropout=0.2"]
    train_recipe(tmp_path / "with", "sft_lora", *options, "eval.every=2")
    train_recipe(tmp_path / "without", "sft_lora", *options, "eval.at_start=false", "eval.every=100")
    assert curve(tmp_path / "with") == curve(tmp_path / "without")


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    runs = {
        name: train_recipe(tmp_path / name, "sft_lora", *SHORT, f"seed={seed}") for name, seed in [("a", 1), ("b", 1), ("c", 2)]
    }
    assert len(runs) == 3
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert curve(tmp_path / "a") != curve(tmp_path / "c")
    assert QUIET


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after two steps."""
    place = tmp_path_factory.mktemp("stopped") / "run"
    stop_after(2, place, "sft_lora", *SHORT, "eval.at_start=false")
    return place


ODD: dict[str, tuple[str, object]] = {
    "a step in words": ("progress", {"step": "two"}),
    "a negative position": ("progress", {"step": 2, "drawn": -5}),
    "no judge": ("judge", {"best": "x"}),
    "a list of methods": ("wrappers", [1]),
    "an optimizer without its class": ("optimizer_facts", {"a": 1}),
    "no state of generators": ("random", []),
    "parts of no dtype": ("delta_parts", {"x": ["load", [2]]}),
    "structures in words": ("structures", "x"),
    "a number of lines in words": ("events", {"lines": "x"}),
    "a best value in words": ("judge", {"best": "low", "best_step": 1, "waited": 0, "seen": 1}),
    "a best step in words": ("judge", {"best": 1.0, "best_step": "one", "waited": 0, "seen": 1}),
    "a patience below zero": ("judge", {"best": 1.0, "best_step": 1, "waited": -4, "seen": 1}),
    "generators in words": ("random", [{"python": [3, "x", None], "numpy": [], "torch": "", "cuda": []}]),
    "generators of another process's kind": ("random", {"0": {}}),
    "parts of tens of terabytes": ("delta_parts", {"x": ["float32", [10**7, 10**6]]}),
    "parts of a length below zero": ("delta_parts", {"x": ["float32", [-(10**9), 10**6]]}),
}
"""What is odd -> the document of a checkpoint, and its content."""


def rewritten(run: Path, place: Path) -> Path:
    """Copy a run, so that a test may change its only checkpoint."""
    shutil.copytree(run, place)
    return next((place / "checkpoints").iterdir())


def sealed(checkpoint: Path) -> None:
    """Give a changed checkpoint the checksums of what it now holds."""
    write_checksums(checkpoint)
    listed = json.loads((checkpoint / "checksums.json").read_text())
    (checkpoint / "checksums.json").write_text(json.dumps({"step": int(checkpoint.name.removeprefix("step-")), **listed}))


@pytest.mark.parametrize("name", ODD)
def test_a_checkpoint_of_odd_content_is_one_message(name: str, stopped: Path, tmp_path: Path) -> None:
    """Its checksums are right: somebody made it so."""
    checkpoint = rewritten(stopped, tmp_path / "run")
    document, content = ODD[name]
    (checkpoint / f"{document}.json").write_text(json.dumps(content))
    sealed(checkpoint)
    with pytest.raises(RunError, match=r"the checkpoint .*step-000002 cannot be used: "):
        resume(tmp_path / "run")


def test_a_checkpoint_of_odd_shapes_is_one_message(stopped: Path, tmp_path: Path) -> None:
    checkpoint = rewritten(stopped, tmp_path / "run")
    tensors = load_file(str(checkpoint / "delta.safetensors"))
    save_file({**tensors, next(iter(tensors)): torch.zeros(3)}, str(checkpoint / "delta.safetensors"))
    sealed(checkpoint)
    with pytest.raises(RunError, match=r"the checkpoint .*step-000002 cannot be used: "):
        resume(tmp_path / "run")


def test_a_full_disk_is_no_fault_of_a_checkpoint(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewritten(stopped, tmp_path / "run")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Events, "resume", full)
    with pytest.raises(OSError, match="No space left"):
        resume(tmp_path / "run")
