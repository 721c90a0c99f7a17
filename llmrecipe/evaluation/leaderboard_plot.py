"""The plot of a leaderboard: score over cost, one point per method, error bars over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from llmrecipe.core.errors import RunError
from llmrecipe.core.figures import new_figure
from llmrecipe.evaluation.leaderboard_labels import FULL
from llmrecipe.evaluation.leaderboard_table import Column, LeaderboardRow

COLOURS = ("#0969da", "#cf222e", "#1a7f37", "#8250df", "#bf8700", "#57606a", "#0598bc", "#bf3989")
STACKED = 0.035
"""Minimum distance between two labels, as a share of the plot's height."""


LOGARITHMIC = ("trained",)
"""Costs that spread over orders of magnitude."""


def draw_plot(
    rows: Sequence[LeaderboardRow], costs: Column | Sequence[Column], y: Column, path: Path, line: str | None = FULL
) -> None:
    """Draw the plot into a file, a panel for each cost; rows without a run are left out.

    Args:
        costs: what the score is drawn over.
        y: score.
        line: name of the row whose score is drawn as a line across.

    Raises:
        RunError: matplotlib is not installed, or the file cannot be written.
    """
    panels = [costs] if isinstance(costs, Column) else list(costs)
    across = min(len(panels), 2)
    down = -(-len(panels) // across)
    figure = new_figure(9 * across, 5.6 * down, "plot: false leaves the picture out")
    made = [row for row in rows if row.seeds]
    try:
        for number, cost in enumerate(panels, 1):
            _panel(figure.add_subplot(down, across, number), made, cost, y, line)
        figure.savefig(path, dpi=110)
    except (ValueError, OSError) as error:
        raise RunError(f"plot: cannot write {path}: {error}") from error


def _panel(axis: Axes, rows: Sequence[LeaderboardRow], x: Column, y: Column, line: str | None) -> None:
    """Draw the score over one cost."""
    for colour, family in zip(cycle(COLOURS), dict.fromkeys(r.family for r in rows), strict=False):
        own = [r for r in rows if r.family == family]
        across, up = [r.mean[x.key] * x.scale for r in own], [r.mean[y.key] * y.scale for r in own]
        bars = [(r.spread[y.key] or 0.0) * y.scale for r in own]
        axis.errorbar(across, up, yerr=bars, fmt="o", color=colour, capsize=3, label=family)
    if x.key in LOGARITHMIC:
        axis.set_xscale("log")
    axis.margins(x=0.14, y=0.08)
    for r in rows:
        if r.label == line:
            axis.axhline(r.mean[y.key] * y.scale, color="#57606a", linewidth=0.8, linestyle="--")
    _label(axis, [(r.label, r.mean[x.key] * x.scale, r.mean[y.key] * y.scale) for r in rows])
    axis.set_xlabel(x.title)
    axis.set_ylabel(y.title)
    axis.grid(alpha=0.25)
    if rows:
        axis.legend(fontsize=8, loc="best")


def draw_parts(rows: Sequence[LeaderboardRow], parts: Sequence[Column], path: Path) -> None:
    """Draw one bar for each row with a run, divided into the given columns, the largest bar at the top.

    Raises:
        RunError: matplotlib is not installed, or the file cannot be written.
    """
    ordered = sorted((row for row in rows if row.seeds), key=lambda row: sum(row.mean[c.key] for c in parts))
    figure = new_figure(9, 1.2 + 0.34 * len(ordered), "plot: false leaves the picture out")
    axis = figure.add_subplot()
    try:
        left = [0.0] * len(ordered)
        for colour, column in zip(COLOURS, parts, strict=False):
            widths = [row.mean[column.key] * column.scale for row in ordered]
            axis.barh([row.label for row in ordered], widths, left=left, color=colour, label=column.title.removesuffix(" MB"))
            left = [before + width for before, width in zip(left, widths, strict=True)]
        axis.set_xlabel("MB")
        axis.legend(fontsize=8, loc="best")
        figure.savefig(path, dpi=110)
    except (ValueError, OSError) as error:
        raise RunError(f"plot: cannot write {path}: {error}") from error


def _label(axis: Axes, points: list[tuple[str, float, float]]) -> None:
    """Draw names to the right of their points, moved down where they would overlap another one."""
    axis.autoscale_view()
    to_axes = axis.transData + axis.transAxes.inverted()
    placed: list[tuple[float, float]] = []
    for name, x, y in sorted(points, key=lambda p: -p[2]):
        at_x, at_y = to_axes.transform((x, y))
        text_y = at_y
        while any(abs(text_y - other_y) < STACKED and abs(at_x - other_x) < 0.16 for other_x, other_y in placed):
            text_y -= STACKED / 4
        placed.append((at_x, text_y))
        axis.annotate(
            name, (x, y), xytext=(at_x + 0.012, text_y), textcoords="axes fraction", fontsize=8, va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#8c959f"} if at_y - text_y > STACKED else None,
        )  # fmt: skip
