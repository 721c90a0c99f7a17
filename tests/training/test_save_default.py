"""Without `save.every` a checkpoint is written every few minutes, so a kill never costs more."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrecipe.core.errors import RecipeError
from llmrecipe.recipe.compose import compose
from llmrecipe.training import run as run_module
from tests.trainings import events, train_recipe

WORDS = ["steps=3", "data.limit=4", "eval.at_start=false", "eval.batches=1", "data.max_dropped=0.9", "batch.size=2"]


def test_the_clock_decides_where_no_steps_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(run_module, "SAVE_SHARE", -1.0)
    train_recipe(tmp_path / "always", "sft_lora", *WORDS)
    assert [e["step"] for e in events(tmp_path / "always", "save")] == [1, 2]
    monkeypatch.setattr(run_module, "SAVE_SHARE", 1e9)  # a checkpoint that takes long is not written at once again
    train_recipe(tmp_path / "dear", "sft_lora", *WORDS)
    assert [e["step"] for e in events(tmp_path / "dear", "save")] == [1]


def test_compose_takes_words_or_a_mapping() -> None:
    given = {
        "optim.lr": 1e-4,
        "stack": ["nf4", "lora"],
        "stack.lora": {"r": 4},
        "data.system": 'a "b" ',
    }
    ran = compose("sft_lora", given)
    assert ran.recipe.optim["lr"] == 1e-4 and list(ran.recipe.stack) == ["nf4", "lora"] and ran.recipe.stack["lora"]["r"] == 4
    assert ran.recipe.data.system == 'a "b" '
    assert compose("sft_lora", ran.overrides).mapping == ran.mapping, "the words of the mapping mean the same"
    for wrong in ("optim.lr=1", {1: 2}, [{"optim.lr": 1}], 5, None):
        with pytest.raises(RecipeError, match="overrides are a list of words"):
            compose("sft_lora", wrong)  # type: ignore[arg-type]
