"""`llmrecipe compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmrecipe.cli.arguments import Json, Quiet, Verbose
from llmrecipe.cli.completion import complete_run
from llmrecipe.core.console import print_json, say

if TYPE_CHECKING:
    from llmrecipe.runs.run_record import Record

PANEL = "Look"
ORDER = 30


def verb(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", autocompletion=complete_run, help="Run directories.", show_default=False)
    ],
    metric: Annotated[
        list[str] | None, typer.Option("--metric", "-m", help="Curves to show; default: loss, eval/loss.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw the curves into this file (.png, .svg, .pdf).")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write one self-contained HTML page.")] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Compare runs: what differs in their recipes, where they ended, how their curves went."""
    from llmrecipe.runs.run_record import check_metric, differences, read_runs

    records = read_runs([str(r) for r in runs])
    for name in metric or []:
        check_metric(records, name)
    wanted = metric or [m for m in ("loss", "eval/loss") if any(r.curve(m) for r in records)]
    if plot is not None:
        draw_panels(records, wanted, plot)
    if out is not None:
        from llmrecipe.runs.report.render import write_drawn
        from llmrecipe.runs.report.several import several_page

        write_drawn("compare", out, several_page(records, metric or []))
    if as_json:
        curves = {r.name: {m: r.curve(m) for m in wanted} for r in records}
        facts = {r.name: r.facts() for r in records}
        print_json({"runs": facts, "differences": differences(records), "curves": curves})
        return
    _show(records, differences(records), wanted)
    if plot is not None:
        say(f"curves: {plot}")
    if out is not None:
        say(f"report: {out}")


def _show(records: list[Record], differ: dict[str, list[Any]], metrics: list[str]) -> None:
    from rich.table import Table

    from llmrecipe.core.console import console, number, sparkline, value_text
    from llmrecipe.core.score_intervals import shown

    screen = console()
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for record in records:
        table.add_column(record.name, overflow="fold")
    facts = [shown(r.facts(), number) for r in records]
    for key in dict.fromkeys(k for f in facts for k in f):
        table.add_row(key, *(f.get(key, number(None)) for f in facts))
    if differ:
        table.add_row("keys of the recipe", style="bold")
    for key, values in differ.items():
        table.add_row(key, *(value_text(v) for v in values), style="cyan")
    screen.print(table)
    for metric in metrics:
        for record in records:
            curve = [v for _, v in record.curve(metric)]
            if curve:
                ends = f"{number(curve[0])} -> {number(curve[-1])}"
                screen.print(f"{metric:12} {sparkline(curve, 50):50} {ends}  {record.name}")


def draw_panels(records: list[Record], metrics: list[str], path: Path) -> None:
    """Draw one panel per metric, one line per run.

    Raises:
        RunError: matplotlib is not installed, or the file's kind is unknown to it.
    """
    from llmrecipe.core.errors import RunError
    from llmrecipe.core.figures import new_figure

    panels = max(1, len(metrics))
    figure = new_figure(5 * panels, 3.6, "the table is complete without --plot")
    axes = figure.subplots(1, panels, squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=False):
        for record in records:
            curve = record.curve(metric)
            if curve:
                axis.plot(*zip(*curve, strict=True), label=record.name, marker="." if len(curve) < 20 else None)
        axis.set_title(metric)
        axis.set_xlabel("step")
        axis.legend(fontsize=7)
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise RunError(f"--plot: cannot write {path}: {error}") from error
