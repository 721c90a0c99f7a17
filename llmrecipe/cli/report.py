"""`llmrecipe report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmrecipe.cli.arguments import Json, Quiet, Verbose
from llmrecipe.cli.completion import complete_run
from llmrecipe.core.console import print_json, say

PANEL = "Look"
ORDER = 31


def verb(
    run: Annotated[Path, typer.Argument(metavar="RUN", autocompletion=complete_run, help="Run directory.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; default: RUN/report.html.")] = None,
    card: Annotated[Path | None, typer.Option("--card", help="Also draw outcome and score as SVG, for a README.")] = None,
    live: Annotated[bool, typer.Option("--live", help="Serve the page on this machine, where it follows the run.")] = False,
    port: Annotated[int, typer.Option("--port", help="With --live: the port; 0 takes a free one.", min=0, max=65535)] = 0,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page about a run: outcome, curves, samples, recipe, data, warnings, environment.

    With --live the page is served at 127.0.0.1 instead, until Ctrl-C, and shows a running training as it goes on.
    """
    if live:
        _serve(run, out or card, port, as_json)
        return
    from llmrecipe.runs.report.page import run_page
    from llmrecipe.runs.report.render import write_drawn
    from llmrecipe.runs.run_record import read_run

    target = out or run / "report.html"
    files = {target: run_page(run, predicted=_predicted(run))}
    if card is not None:
        from llmrecipe.runs.report.card import report_card

        files[card] = report_card(run)
    for path, text in files.items():
        write_drawn("report", path, text)
    if as_json:
        print_json({"report": str(target), **read_run(run).facts()})
    else:
        say(f"report: {target}" + (f"\ncard: {card}" if card is not None else ""))


def _serve(run: Path, out: Path | None, port: int, as_json: bool) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        RunError: there is no run, the port is in use, or a file was also requested.
    """
    import contextlib
    import sys

    from llmrecipe.core.errors import RunError
    from llmrecipe.runs.report.serve import ReportServer

    if out is not None:
        raise RunError("report: --out and --card write a file and --live serves a page; give one of them")
    with ReportServer(run, port) as server:
        if as_json:
            print_json({"report": server.address})
            sys.stdout.flush()
        else:
            say(f"report: {server.address} (Ctrl-C ends it)")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _predicted(run: Path) -> dict[str, int]:
    """Return the bytes that `check` predicts for a run; nothing where it counted none, or where its data or base are gone."""
    from llmrecipe.core.errors import UserError
    from llmrecipe.runs.run_record import run_document

    if "memory" not in run_document(run, "report.json"):
        return {}
    from llmrecipe.training.dry_run import predict_memory

    try:
        return predict_memory(run).predicted()
    except UserError:
        return {}
