"""`llmrecipe explain`."""

from __future__ import annotations

from typing import Annotated

import typer

from llmrecipe.cli.arguments import ConfigDir, Json, Words, need_recipe, sort_words, tell
from llmrecipe.core.console import print_json

PANEL = "Look"
ORDER = 1


def verb(
    words: Words = None,
    changed: Annotated[bool, typer.Option("--changed", help="Leave out values that are defaults.")] = False,
    config_dir: ConfigDir = None,
    as_json: Json = False,
) -> None:
    """Show every value of a recipe with the file and line, or the override, that set it."""
    request = sort_words(words)
    recipe = need_recipe(request, "explain")
    from llmrecipe.recipe.compose import compose
    from llmrecipe.recipe.explain import explain
    from llmrecipe.recipe.yaml_file import dotted

    composition = compose(recipe, request.overrides)
    lines = [line for line in explain(composition) if not (changed and line.origin.kind == "default")]
    tell(composition.notes)
    if as_json:
        facts = [line.as_json() for line in lines]
        print_json({"recipe": composition.name, "file": str(composition.path), "notes": composition.notes, "values": facts})
        return
    from rich.table import Table
    from rich.text import Text

    from llmrecipe.core.console import console, value_text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("key", "value", "set by"):
        table.add_column(heading, overflow="fold")
    for line in lines:
        style = "dim" if line.origin.kind == "default" else "bold" if line.origin.kind == "override" else ""
        table.add_row(Text(dotted(line.key), style), Text(value_text(line.value), style), Text(str(line.origin), style))
    console().print(table)
