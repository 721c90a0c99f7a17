"""model.compile: the same losses from a compiled forward pass, and one clear line where nothing can be compiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from llmrecipe.core.errors import RecipeError
from llmrecipe.models.optimizations import ready_to_compile
from tests.trainings import curve, train_recipe

SMALL = ["model.init=random", "model.config={num_hidden_layers: 1}", "steps=3", "batch.size=4", "eval.test=false"]
QUIET = ["eval.at_start=false", "eval.batches=1"]


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_a_plain_one(tmp_path: Path) -> None:
    train_recipe(tmp_path / "plain", "sft_lora", *SMALL, *QUIET)
    train_recipe(tmp_path / "compiled", "sft_lora", *SMALL, *QUIET, "model.compile=true")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for plain, compiled in zip(curve(tmp_path / "plain"), curve(tmp_path / "compiled"), strict=True):
        assert compiled[1] == pytest.approx(plain[1], rel=1e-5)
        assert compiled[2] == pytest.approx(plain[2], rel=1e-3)


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RecipeError, match=r"model\.compile: needs a C\+\+ compiler for a CPU \(.* or clang\+\+\)"):
        ready_to_compile(torch.device("cpu"))
