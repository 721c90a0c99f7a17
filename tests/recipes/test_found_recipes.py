"""Recipes that searches wrote are plain: nothing of a search is there when they train."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.recipe_paths import all_recipes
from tests.support import ROOT

FOUND = sorted(name for name, path in all_recipes().items() if path.parent.name == "found")
TRAIN = """
import sys
from pathlib import Path
from tests.trainings import train_recipe
train_recipe(Path(sys.argv[1]), sys.argv[2], *sys.argv[3:])
print(sorted(m for m in sys.modules if m.startswith(("llmrecipe.pipelines", "optuna", "botorch"))))
"""


def test_they_hold_no_search_and_no_stages() -> None:
    assert FOUND
    for name in FOUND:
        recipe = compose(name).recipe
        assert recipe.search is None and recipe.stages is None and recipe.stack


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUND)
def test_they_train_without_the_code_of_a_search(name: str, tmp_path: Path) -> None:
    words = ["epochs=null", "steps=1", "data.limit=64", "eval.at_start=false", "eval.batches=1", "eval.bootstrap=0"]
    given = [sys.executable, "-c", TRAIN, str(tmp_path / "run"), name, *words]
    done = subprocess.run(given, capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "[]"
