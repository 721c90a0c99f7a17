"""A composition depends on its recipe and its overrides, never on what was composed before it in the process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.recipe_paths import all_recipes

RECIPES = sorted(all_recipes())


def text(recipe: str, *words: str) -> str:
    return json.dumps(compose(recipe, list(words)).mapping, sort_keys=True)


def soil(value: Any) -> None:
    """Change everything in a mapping that can be changed."""
    if isinstance(value, dict):
        for inner in list(value.values()):
            soil(inner)
        value["added"] = 1
    elif isinstance(value, list):
        value.append("added")


@pytest.mark.parametrize("recipe", ["sft", "coda", pytest.param("grpo", marks=pytest.mark.slow)])
def test_whoever_changes_a_composition_changes_his_own(recipe: str) -> None:
    before = text(recipe, "stack=[]")
    soil(compose(recipe, ["stack=[]"]).mapping)
    assert text(recipe, "stack=[]") == before


@pytest.mark.parametrize("recipe", [pytest.param(n, marks=() if n == "qlora" else pytest.mark.slow) for n in RECIPES])
def test_an_empty_stack_composes_everywhere_and_leaves_no_trace(recipe: str) -> None:
    before = text(recipe)
    assert json.loads(text(recipe, "stack=[]"))["stack"] == {}
    with pytest.raises(RecipeError):
        compose(recipe, ["stack=[]", "stack.no_such.r=3"])
    assert text(recipe) == before


@pytest.mark.slow
def test_the_order_of_compositions_does_not_matter() -> None:
    first = {name: text(name) for name in RECIPES}
    assert {name: text(name) for name in reversed(RECIPES)} == first


def test_a_plugin_opened_earlier_is_not_borrowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lender"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "sevens.py").write_text(
        '"""Sevens."""\n\nfrom llmrecipe.plugin import ClassVar, Stage, Wrapper, register\n\n\n'
        "@register\nclass Sevens(Wrapper):\n"
        '    """Nothing."""\n\n    stage: ClassVar[Stage] = Stage.INJECT\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_plugins", [])
    try:
        assert "sevens" in compose("sft_lora", ["plugins=[lender]", "stack=[sevens]"]).mapping["stack"]
        with pytest.raises(RecipeError, match=r"stack\.sevens: sevens comes from the package 'lender'.*plugins=\[lender\]"):
            compose("sft_lora", ["stack=[sevens]"])
        compose("sft_lora")
    finally:
        registry._plugins.clear()
        registry._index.cache_clear()
