"""`llmrecipe schema`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmrecipe.core.console import say

PANEL = "Tools"
ORDER = 3


def verb(out: Annotated[Path | None, typer.Option("--out", "-o", help="Write to this file instead of stdout.")] = None) -> None:
    """Print the JSON Schema of recipes, for completion and checks in an editor."""
    from llmrecipe.core.errors import RunError
    from llmrecipe.recipe.compose import load_entry_points
    from llmrecipe.recipe.jsonschema import schema_text

    load_entry_points()
    text = schema_text()
    if out is None:
        print(text, end="")
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"--out {out}: cannot be written: {error.strerror}") from error
    say(f"wrote {out}; put this line on top of a recipe: # yaml-language-server: $schema={out}")
