"""`llmrecipe new`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PANEL = "Tools"
ORDER = 1

TEMPLATE = """\
# {title}: one line on what it does.
#   llmrecipe train recipe={name} data.path=rows.jsonl
defaults:
  - /{base}
{choices}  - _self_

# Only what differs from the defaults belongs here; `llmrecipe explain recipe={name}` shows everything.
model: {{path: tiny}}
# data: {{path: rows.jsonl}}
"""


def verb(
    what: Annotated[str, typer.Argument(metavar="[KIND]", help="recipe (may be left out), method, objective or metric.")],
    name: Annotated[str | None, typer.Argument(help="Its name; of a recipe also a path ending in .yaml.")] = None,
    folder: Annotated[
        Path, typer.Option("--dir", help="Package a component goes into; recipes and tests lie next to it.")
    ] = Path("my_components"),
    extends: Annotated[str, typer.Option("--extends", help="Recipe a new one extends.")] = "base",
    objective: Annotated[str | None, typer.Option("--objective", help="Objective a recipe trains.")] = None,
    stack: Annotated[str | None, typer.Option("--stack", help="Methods of a recipe, comma-separated: nf4,lora.")] = None,
) -> None:
    """Write the skeleton of a recipe into ./recipes, or of a method, an objective or a metric with its recipe and its test."""
    from llmrecipe.cli import skeletons
    from llmrecipe.core.errors import RecipeError, did_you_mean

    kinds = ("recipe", *skeletons.GROUPS)
    if name is None:
        if what in skeletons.GROUPS:
            raise RecipeError(
                f"new {what}: say what it is called: llmrecipe new {what} NAME; a recipe: llmrecipe new recipe {what}"
            )
        _recipe(what, extends, objective, stack)
    elif what == "recipe":
        _recipe(name, extends, objective, stack)
    elif what in kinds:
        _component(what, name, folder)
    else:
        raise RecipeError(f"new {what}: nothing of that kind can be written{did_you_mean(what, kinds)} ({', '.join(kinds)})")


def _component(what: str, name: str, folder: Path) -> None:
    """Write a component with its recipe and its test, and say how they are run."""
    from llmrecipe.cli import skeletons
    from llmrecipe.core.paths import PACKAGE

    files = skeletons.write_skeleton(what, name, folder)
    for path in files:
        print(f"wrote {path}")
    root = PACKAGE.parent if folder.resolve().is_relative_to(PACKAGE) else folder.resolve().parent
    test = next(path for path in files if path.name.startswith("test_")).resolve().relative_to(root)
    print(f"next, in {root}: python -m pytest {test}; python -m llmrecipe train recipe={name}")


def _recipe(name: str, extends: str, objective: str | None, stack: str | None) -> None:
    """Write the skeleton of a recipe; it is taken back where it does not compose."""
    from llmrecipe.core.errors import RecipeError
    from llmrecipe.recipe.compose import compose
    from llmrecipe.recipe.hydra_compose import refused_choices
    from llmrecipe.recipe.recipe_paths import find_recipe

    methods = [m.strip() for m in stack.split(",") if m.strip()] if stack is not None else None
    wrong = refused_choices("objective", objective, "--objective") + refused_choices("stack", methods, "--stack")
    if wrong:
        raise RecipeError("\n".join(wrong))
    find_recipe(extends)
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path("recipes") / f"{name}.yaml"
    if path.exists():
        raise RecipeError(f"{path} exists already; choose another name")
    choices = f"  - override /objective: {objective}\n" if objective else ""
    choices += f"  - override /stack: [{', '.join(methods)}]\n" if methods is not None else ""
    word = path.stem if path.parent.name == "recipes" else str(path)
    text = TEMPLATE.format(title=path.stem, name=word, base=extends.strip("/"), choices=choices)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        compose(path)
    except RecipeError:
        path.unlink()
        raise
    print(f"wrote {path}; next: llmrecipe explain recipe={word}")
