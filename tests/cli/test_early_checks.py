"""What is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrecipe.cli.early_checks import check_files
from llmrecipe.core.errors import RecipeError
from llmrecipe.recipe.compose import compose


def test_a_run_of_which_nothing_would_be_read_is_refused(tmp_path: Path) -> None:
    """A recipe of fresh weights with a tokenizer of its own; weights, shape or tokenizer of the run are a reason to name it."""
    run = tmp_path / "run"
    (run / "final" / "model").mkdir(parents=True)
    (run / "final" / "model" / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"nothing of the run .*run would be read: .*set model\.init=pretrained"):
        check_files(compose("vqa", [f"model.path={run}"]).recipe)
    for words in (["model.init=pretrained", "model.config={}"], ["model.config={}"], ["tokenizer.path=null"]):
        check_files(compose("vqa", [f"model.path={run}", *words]).recipe)
    check_files(compose("vqa").recipe)
