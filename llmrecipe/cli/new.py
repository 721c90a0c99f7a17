"""`llmrecipe new`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmrecipe.cli.arguments import Quiet, Verbose
from llmrecipe.core.console import say

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
    what: Annotated[
        str | None,
        typer.Argument(metavar="[KIND]", help="recipe (may be left out), method, objective or metric.", show_default=False),
    ] = None,
    name: Annotated[
        str | None, typer.Argument(help="Its name; of a recipe also a path ending in .yaml.", show_default=False)
    ] = None,
    folder: Annotated[
        Path, typer.Option("--dir", help="Package a component goes into; recipes and tests lie next to it.")
    ] = Path("my_components"),
    extends: Annotated[
        str | None, typer.Option("--extends", help="Recipe a new one extends; default: base.", show_default=False)
    ] = None,
    objective: Annotated[str | None, typer.Option("--objective", help="Objective a recipe trains.")] = None,
    stack: Annotated[str | None, typer.Option("--stack", help="Methods of a recipe, comma-separated: nf4,lora.")] = None,
    from_data: Annotated[
        str | None,
        typer.Option("--from-data", metavar="FILE", help="Fit the recipe to these rows, and explain it."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="PATH", help="Model that --from-data counts tokens for and names.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", metavar="WANTED=YOURS,...", help="What the columns of --from-data are.")
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the skeleton of a recipe into ./recipes, or of a method, an objective or a metric with its recipe and its test.

    `new --from-data rows.csv` writes a recipe fitted to a file instead, which trains as it is.
    """
    from llmrecipe.cli import skeletons
    from llmrecipe.core.errors import RecipeError, did_you_mean

    kinds = ("recipe", *skeletons.GROUPS)
    if from_data is not None:
        if name is not None and what != "recipe":
            raise RecipeError(f"new {what}: --from-data writes a recipe: llmrecipe new NAME --from-data {from_data}")
        if extends is not None:
            raise RecipeError("--extends: what is extended follows from the rows; name another objective with --objective")
        _fitted(name or what, from_data, model, columns, objective, stack)
        return
    if alone := [flag for flag, value in (("--model", model), ("--columns", columns)) if value is not None]:
        raise RecipeError(f"new: {alone[0]} belongs to --from-data FILE")
    extends = extends or "base"
    if what is None:
        raise RecipeError("new: name the recipe, llmrecipe new NAME, or the rows it is for, llmrecipe new --from-data FILE")
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
        say(f"wrote {path}")
    root = PACKAGE.parent if folder.resolve().is_relative_to(PACKAGE) else folder.resolve().parent
    test = next(path for path in files if path.name.startswith("test_")).resolve().relative_to(root)
    say(f"next, in {root}: python -m pytest {test}; python -m llmrecipe train recipe={name}")


def _recipe(name: str, extends: str, objective: str | None, stack: str | None) -> None:
    """Write the skeleton of a recipe; it is taken back where it does not compose."""
    from llmrecipe.cli.recipe_file import recipe_word, write_recipe
    from llmrecipe.core.errors import RecipeError
    from llmrecipe.recipe.compose import compose
    from llmrecipe.recipe.recipe_paths import find_recipe
    from llmrecipe.recipe.yaml_file import choice_lines

    methods = _chosen(objective, stack)
    find_recipe(extends)
    path = _recipe_file(name)
    chosen: dict[str, str | list[str]] = {"objective": objective} if objective else {}
    if methods is not None:
        chosen["stack"] = methods
    choices = "".join(f"{line}\n" for line in choice_lines(chosen))
    word = recipe_word(path)
    write_recipe(path, TEMPLATE.format(title=path.stem, name=word, base=extends.strip("/"), choices=choices))
    try:
        compose(path)
    except RecipeError:
        path.unlink()
        raise
    say(f"wrote {path}; next: llmrecipe explain recipe={word}")


def _chosen(objective: str | None, stack: str | None) -> list[str] | None:
    """Return the methods of `--stack`.

    Raises:
        RecipeError: there is no such objective or method.
    """
    from llmrecipe.core.errors import RecipeError
    from llmrecipe.recipe.hydra_compose import refused_choices

    methods = [m.strip() for m in stack.split(",") if m.strip()] if stack is not None else None
    wrong = refused_choices("objective", objective, "--objective") + refused_choices("stack", methods, "--stack")
    if wrong:
        raise RecipeError("\n".join(wrong))
    return methods


def _recipe_file(name: str) -> Path:
    """Return the file of a new recipe.

    Raises:
        RecipeError: it exists.
    """
    from llmrecipe.core.errors import RecipeError

    path = Path(name) if name.endswith((".yaml", ".yml")) else Path("recipes") / f"{name}.yaml"
    if path.exists():
        raise RecipeError(f"{path} exists already; choose another name")
    return path


def _fitted(
    name: str | None, file: str, model: str | None, columns: str | None, objective: str | None, stack: str | None
) -> None:
    """Write a recipe fitted to a file, with the schema that its first line names."""
    from llmrecipe.cli.fitted_recipe import fit_recipe, readable
    from llmrecipe.cli.recipe_file import free_name, recipe_word, write_recipe
    from llmrecipe.cli.recipe_text import SCHEMA, recipe_text
    from llmrecipe.recipe.compose import load_entry_points
    from llmrecipe.recipe.jsonschema import schema_text

    load_entry_points()
    methods = _chosen(objective, stack)
    path = _recipe_file(name or free_name(Path(file.partition(":")[2] or file).name.split(".")[0]))
    found = fit_recipe(file, path.stem, model, _mapping(columns), objective, methods)
    write_recipe(path, recipe_text(found, recipe_word(path)))
    try:
        note = readable(found, path)
        write_recipe(path, recipe_text(found, recipe_word(path)))
    except BaseException:
        path.unlink()
        raise
    schema = path.parent / SCHEMA
    if not schema.exists():
        write_recipe(schema, schema_text())
        say(f"wrote {schema}, for editors")
    if note:
        say(f"note: {note}")
    say(f"{found.objective} on {found.reading.found.name} rows, extending {found.parent}; the recipe says why")
    say(f"wrote {path}; next: llmrecipe data recipe={recipe_word(path)}, then llmrecipe train recipe={recipe_word(path)}")


def _mapping(text: str | None) -> dict[str, str]:
    """Parse `prompt=ask,completion=reply`.

    Raises:
        RecipeError: a part is not of this form.
    """
    from llmrecipe.core.errors import RecipeError

    found: dict[str, str] = {}
    for part in text.split(",") if text is not None else []:
        wanted, equals, column = (side.strip() for side in part.partition("="))
        if not equals or not wanted or not column:
            raise RecipeError(f"--columns {text}: write WANTED=YOURS for each, as in --columns prompt=ask,completion=reply")
        found[wanted] = column
    return found
