"""`llmrecipe adapt`."""

from __future__ import annotations

from typing import Annotated

import typer

from llmrecipe.cli.arguments import Json, Quiet, Verbose, Words
from llmrecipe.cli.completion import complete_run
from llmrecipe.core.console import console, number, print_json, say

PANEL = "Use"
ORDER = 5


def verb(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN", autocompletion=complete_run, help="A finished run with stack=[hypertuning].", show_default=False
        ),
    ],
    words: Words = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Turn a few examples of a new task into an adapter, without training (data.path=FILE); the result is an ordinary run."""
    from llmrecipe.cli.early_checks import finished
    from llmrecipe.interop.run_plugins import open_plugins_of

    open_plugins_of(run)
    finished(run)
    from llmrecipe.evaluation.adapt import adapt

    folder, facts = adapt(run, list(words or []))
    if as_json:
        print_json({"run": str(folder), **facts})
        return
    from rich.table import Table

    table = Table("metric", "value", box=None, header_style="bold")
    for name, value in facts.items():
        table.add_row(name, number(value))
    console().print(table)
    say(f"done: {folder}")
