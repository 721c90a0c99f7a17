"""`llmrecipe report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmrecipe.cli.arguments import Json
from llmrecipe.core.console import print_json

PANEL = "Look"
ORDER = 31


def verb(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; default: RUN/report.html.")] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page about a run: outcome, curves, samples, recipe, warnings, environment."""
    from llmrecipe.core.errors import RunError
    from llmrecipe.runs.report.page import run_page
    from llmrecipe.runs.run_record import read_run

    target = out or run / "report.html"
    text = run_page(run)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"report: cannot write {target}: {error.strerror or error}") from error
    if as_json:
        print_json({"report": str(target), **read_run(run).facts()})
    else:
        print(f"report: {target}")
