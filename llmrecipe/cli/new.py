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
    name: Annotated[str, typer.Argument(help="Name of the recipe, or a path ending in .yaml.")],
    extends: Annotated[str, typer.Option("--extends", help="Recipe it extends.")] = "base",
    objective: Annotated[str | None, typer.Option("--objective", help="Objective it trains.")] = None,
    stack: Annotated[str | None, typer.Option("--stack", help="Methods, comma-separated: nf4,lora.")] = None,
) -> None:
    """Write the skeleton of a recipe into ./recipes."""
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
