"""Whole runs inside a test: compose, train, read the events back."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmrecipe.core.errors import Interrupted
from llmrecipe.recipe.compose import compose
from llmrecipe.training import run as run_module
from llmrecipe.training.run import Run
from llmrecipe.training.train import train

QUIET = ["log.live=off", "eval.test=false", "data.cache=false"]


def train_recipe(folder: Path, recipe: str, *overrides: str) -> Run:
    """A finished run in a folder."""
    return train(compose(recipe, [*QUIET, f"run.dir={folder}", *overrides]))


def resume(folder: Path) -> Run:
    """Continue a run."""
    return train(compose(folder / "recipe.yaml"), folder)


def stop_after(step: int, folder: Path, recipe: str, *overrides: str, number: int = signal.SIGTERM) -> None:
    """Start a run that receives a signal once `step` steps are made."""
    original = Run.report_step

    def report(self: Run, *arguments: Any) -> None:
        original(self, *arguments)
        if self.progress.step == step:
            signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module.Run, "report_step", report)
        with pytest.raises(Interrupted):
            train_recipe(folder, recipe, *overrides)


def events(folder: Path, kind: str = "step") -> list[dict[str, Any]]:
    """Events of one kind."""
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [e for line in lines if (e := json.loads(line))["event"] == kind]


def curve(folder: Path) -> list[tuple[int, float, float | None, float]]:
    """(step, loss, gradient norm, learning rate) of each step."""
    return [(e["step"], e["loss"], e.get("grad_norm"), e["lr"]) for e in events(folder)]


def learned(folder: Path) -> dict[str, Any]:
    """The tensors a finished run left."""
    final = folder / "final"
    path = final / "delta.safetensors"
    return load_file(str(path if path.exists() else final / "model" / "model.safetensors"))


def resumes_to_the_bit(folder: Path, recipe: str, words: Sequence[str], at: int) -> Run:
    """Train once without a stop (`folder/whole`, returned) and once with one (`folder/parts`): curves and tensors are equal."""
    run = train_recipe(folder / "whole", recipe, *words)
    stop_after(at, folder / "parts", recipe, *words)
    resume(folder / "parts")
    assert curve(folder / "parts") == curve(folder / "whole")
    whole, parts = learned(folder / "whole"), learned(folder / "parts")
    assert whole and whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    return run
