"""model.compile: the same losses from a compiled forward pass, and one clear line where nothing can be compiled."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch

from llmrecipe.core.errors import RecipeError
from llmrecipe.models import compiled_blocks
from llmrecipe.models.hooks import between_graphs
from llmrecipe.models.optimizations import ready_to_compile
from tests.trainings import curve, events, train_recipe

SMALL = ["model.init=random", "model.config={num_hidden_layers: 2}", "steps=4", "batch.size=4", "eval.test=false"]
QUIET = ["eval.at_start=false", "eval.batches=1"]
CASES = {
    "packed": ("sft_lora", "data.packing=on"),
    "padded": ("sft_lora", "data.packing=off", "model.gradient_checkpointing=selective"),
    "dpo": ("dpo_lora", "model.gradient_checkpointing=true"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_compiled_run_has_the_losses_of_a_plain_one(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, *words = CASES[case]
    train_recipe(tmp_path / "plain", recipe, *SMALL, *QUIET, *words)
    made = functools.partial(compiled_blocks.compiled_blocks, backend="aot_eager")
    monkeypatch.setattr(compiled_blocks, "compiled_blocks", made)
    train_recipe(tmp_path / "compiled", recipe, *SMALL, *QUIET, *words, "model.compile=blocks")
    for plain, compiled in zip(curve(tmp_path / "plain"), curve(tmp_path / "compiled"), strict=True):
        assert compiled[1] == pytest.approx(plain[1], rel=1e-5)
        assert compiled[2] == pytest.approx(plain[2], rel=1e-3)
    graphs = [event["graphs"] for event in events(tmp_path / "compiled")]
    # The first step counts hooks and is not compiled; the batches after the second have other lengths.
    assert graphs[0] == 0 < graphs[1] == graphs[-1]
    assert f"blocks compiled: {graphs[-1]} graphs, none of them after the first 4 steps" in capsys.readouterr().out
    assert "graphs" not in events(tmp_path / "plain")[0]
    assert between_graphs.apart is None


@pytest.mark.slow
def test_a_run_compiled_by_inductor_has_the_losses_of_a_plain_one(tmp_path: Path) -> None:
    train_recipe(tmp_path / "plain", "sft_lora", *SMALL, *QUIET)
    train_recipe(tmp_path / "compiled", "sft_lora", *SMALL, *QUIET, "model.compile=blocks")
    for plain, compiled in zip(curve(tmp_path / "plain"), curve(tmp_path / "compiled"), strict=True):
        assert compiled[1:3] == pytest.approx(plain[1:3], rel=1e-3)


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RecipeError, match=r"model\.compile: needs a C\+\+ compiler for a CPU \(.* or clang\+\+\)"):
        ready_to_compile(torch.device("cpu"))
