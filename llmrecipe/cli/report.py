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
    """Write one self-contained HTML page about a run: result, curves, evaluations, samples, recipe, environment."""
    import json

    from llmrecipe.core.errors import RunError
    from llmrecipe.runs.html_report import page
    from llmrecipe.runs.run_record import read_run

    record = read_run(run)
    texts = {n: _read(run / n) for n in ("environment.json", "command.txt", "recipe.yaml")}
    target = out or run / "report.html"
    text = page(record, json.loads(texts["environment.json"] or "{}"), texts["command.txt"], texts["recipe.yaml"])
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"report: cannot write {target}: {error.strerror or error}") from error
    if as_json:
        print_json({"report": str(target), **record.facts()})
    else:
        print(f"report: {target}")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
