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
    import json

    from llmrecipe.core.errors import RunError
    from llmrecipe.recipe.compose import load_entry_points
    from llmrecipe.recipe.jsonschema import json_schema

    load_entry_points()
    text = json.dumps(json_schema(), indent=2, ensure_ascii=False)
    if out is None:
        print(text)
        return
    try:
        out.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"--out {out}: cannot be written: {error.strerror}") from error
    say(f"wrote {out}; put this line on top of a recipe: # yaml-language-server: $schema={out}")
