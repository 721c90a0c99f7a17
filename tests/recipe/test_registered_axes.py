"""Axes that follow the registry: a method that is registered, with a recipe of its own, takes part in the leaderboards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.pipeline_spec import parse_stages
from llmrecipe.recipe.yaml_file import write_yaml

Project = Callable[..., Path]
METHOD = '''"""Extra."""

from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Wrapper


@register
class Extra(Wrapper):
    """Extra: y = W x + b."""
'''
OBJECTIVE = METHOD.replace("llmrecipe.methods._base.method import Wrapper", "llmrecipe.objectives.base import Objective")


@pytest.fixture
def newcomers(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A plugin with a method and an objective, and a recipe for each in the working directory."""
    for family, name, text in (
        ("additive", "extra", METHOD),
        ("alignment", "extra_goal", OBJECTIVE.replace("(Wrapper)", "(Objective)")),
        ("selective", "bare", METHOD),
    ):
        folder = tmp_path / "newcomers" / family
        folder.mkdir(parents=True)
        (folder / f"{name}.py").write_text(text)
    (tmp_path / "newcomers" / "__init__.py").write_text("")
    project("recipes/extra.yaml", "defaults: [/sft, override /stack: [extra], _self_]\n")
    project("recipes/extra_goal.yaml", "defaults: [/base, override /objective: extra_goal, _self_]\n")
    project("recipes/extra_goal_lora.yaml", "defaults: [/extra_goal, override /stack: [lora], _self_]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_plugins", [])
    registry.add_plugin("newcomers")
    yield project
    registry._plugins.clear()
    registry._index.cache_clear()


def axis(recipe: str | Path, stage: str, name: str, *words: str) -> dict[str, Any]:
    return compose(recipe, list(words)).recipe.stages[stage]["matrix"][name]


def test_a_new_component_with_a_recipe_of_its_own_is_on_the_board(newcomers: Project) -> None:
    methods = axis("peft_leaderboard", "method", "method")
    assert methods["extra"] == {} and methods["ia3"] == {"optim": {"lr": 0.02}}, "what stands beside a value stays"
    assert "bare" not in methods and "coda" not in methods, "no recipe; named under `except`"
    objectives = axis("alignment_leaderboard", "aligned", "objective")
    assert objectives["extra_goal_lora"] == {} and "extra_goal" not in objectives and "reward_lora" not in objectives


def test_words_change_and_drop_what_the_registry_gave(newcomers: Project) -> None:
    words = ["stages.method.matrix.method.extra.optim.lr=0.5", "~stages.method.matrix.method.dora"]
    methods = axis("peft_leaderboard", "method", "method", *words)
    assert methods["extra"] == {"optim": {"lr": 0.5}} and "dora" not in methods and "dylora" in methods


def test_a_recipe_that_was_written_down_keeps_its_methods(newcomers: Project) -> None:
    composed = compose("peft_leaderboard", ["~stages.method.matrix.method.extra"])
    again = compose(newcomers("saved.yaml", write_yaml(composed.mapping)))
    assert again.recipe.stages == composed.recipe.stages and "extra" not in str(again.recipe.stages)


def test_the_values_come_from_the_line_that_asked_for_them(project: Project) -> None:
    path = project("grid.yaml", GRID.format(axis="recipe", source="{stack: [selective]}"))
    composed = compose(path)
    origin = composed.origins[("stages", "run", "matrix", "recipe", "bitfit")]
    assert (origin.file, origin.line) == (path, 4)
    assert [s.name for s in parse_stages(composed)][:2] == ["run-fishmask-1", "run-bitfit-1"]


GRID = """stages:
  run:
    matrix: {{recipe: {{fishmask: {{}}}}, seed: [1]}}
    registered: {{{axis}: {source}}}
    recipe: "${{matrix:recipe}}"
"""


@pytest.mark.parametrize(
    ("axis", "source", "told"),
    [
        ("recipe", "{stack: [selectiv]}", "there is no 'selectiv' in stack; did you mean 'selective'?"),
        ("recipe", "{stack: [selective], except: [bitfitt]}", "there is no 'bitfitt' in stack; did you mean 'bitfit'?"),
        ("recipe", "{stac: [selective]}", "registered.recipe.stac: names no group; did you mean 'stack'?"),
        ("recipe", "{stack: selective}", "must hold lists of names; got 'selective'"),
        ("recipe", "selective", "stages.run.registered: must be a mapping such as"),
        ("seed", "{stack: [selective]}", "next to an axis `method: {...}` of `matrix`"),
        ("recip", "{stack: [selective]}", "next to an axis `method: {...}` of `matrix`"),
    ],
)
def test_a_wrong_source_is_named_with_what_is_allowed(project: Project, axis: str, source: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compose(project("grid.yaml", GRID.format(axis=axis, source=source)))
    assert told in str(caught.value) and "grid.yaml:4" in str(caught.value)
