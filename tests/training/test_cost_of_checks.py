"""The checks that every training makes cost less than one hundredth of a run of 100 steps, in processor time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.training import first_step, first_update, step_zero_checks, train, unchanged
from llmrecipe.training.kept_tensors import KeptTensors
from llmrecipe.training.measured_memory import MemoryMeter
from tests.trainings import train_recipe

SHARE = 0.01
CASES = {
    "sft": [],
    "sft_lora": [],
    "dpo_lora": [],
    "grpo": ["objective.max_new_tokens=16"],
    "clm": ["objective.z_loss=1e-4"],
    "clip": [],
    "l2sp": [],
    "ewc": [],
    "hypertuning": [],
}


class Clock:
    """Adds up the processor time of functions, each moment once however they call each other."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.patch, self.seconds, self.inside = patch, 0.0, False

    def watch(self, owner: Any, name: str) -> None:
        """Count a function or method."""
        original: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(original)
        def counted(*given: Any, **more: Any) -> Any:
            if self.inside:
                return original(*given, **more)
            self.inside, started = True, time.process_time()
            try:
                return original(*given, **more)
            finally:
                self.seconds += time.process_time() - started
                self.inside = False

        self.patch.setattr(owner, name, counted)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", CASES)
def test_a_hundred_steps(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, whole = Clock(monkeypatch), Clock(monkeypatch)
    for owner, name in (
        (first_update, "watched"), (first_update, "named_checksums"), (first_update.FirstUpdate, "compare"),
        (first_update.FirstUpdate, "finalize"), (first_step, "_check_hooks"), (first_step, "_judge"), (MemoryMeter, "watch"),
        (KeptTensors, "_add"), (KeptTensors, "_drop"), (unchanged.UnchangedCheck, "__init__"),
        (unchanged.UnchangedCheck, "see"), (step_zero_checks, "check_step_zero"),
    ):  # fmt: skip
        clock.watch(owner, name)
    whole.watch(train, "loop")
    words = ["steps=100", "eval.at_start=false", "eval.every=null", "save.every=null", "eval.batches=1", *CASES[recipe]]
    train_recipe(tmp_path, recipe, *words)
    print(f"{recipe}: {clock.seconds:.3f} s of {whole.seconds:.1f} s")
    assert 0.0 < clock.seconds < SHARE * whole.seconds
