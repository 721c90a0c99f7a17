"""A training and an opened run leave the program around them as it was."""

from __future__ import annotations

import errno
import io
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmrecipe import load, train
from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.runtime.caller_state import VARIABLES, one_training
from tests.trainings import train_recipe


def state() -> list[Any]:
    """What belongs to the caller."""
    return [
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[index,union-attr]
        torch.get_rng_state().tolist(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        {name: os.environ.get(name) for name in VARIABLES},
    ]


class Gone(io.StringIO):
    """A screen that is full."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_training_and_loading_leave_the_caller_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing can be shown."""
    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", Gone())
    threads = torch.get_num_threads()
    words = ["steps=1", "seed=5", f"runtime.threads={threads + 1}", "runtime.deterministic=true", "eval.at_start=false"]
    before = state()
    train_recipe(tmp_path / "run", "sft_lora", *words, "data.limit=16", "data.max_dropped=0.9")
    assert state() == before
    load(tmp_path / "run")
    assert state() == before
    with pytest.raises(RunError):
        train_recipe(tmp_path / "run", "sft_lora", *words)
    assert state() == before, "also after an error"


def test_two_trainings_at_once_are_refused(tmp_path: Path) -> None:
    with one_training(), pytest.raises(RunError, match="another training is running in this process"):
        train_recipe(tmp_path / "run", "sft_lora", "steps=1")
    with one_training():
        pass


@pytest.mark.parametrize("given", ["sft_lora", None])
def test_what_is_no_composition_is_told_where_to_get_one(given: object) -> None:
    with pytest.raises(RecipeError, match=r"train: takes what `compose` returns, as in train\(compose\('sft_lora'\)\); got"):
        train(given)  # type: ignore[arg-type]
