"""Points with error bars and numbers next to them, as SVG: score over cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmrecipe.runs.report.charts import COLOURS, Axis, axis

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 80, 40, 20, 50
"""Edges around the drawing, for labels."""


@dataclass(frozen=True)
class Dot:
    """One point."""

    label: str
    """Text next to it."""
    title: str
    """What it is, for the pointer and for screen readers."""
    kind: str
    """Points of one kind share a colour."""
    x: float
    y: float
    spread: float = 0.0
    """Half the length of its error bar."""


@dataclass(frozen=True)
class PlacedDot:
    """A point in units of the drawing."""

    dot: Dot
    colour: int
    x: float
    y: float
    top: float
    bottom: float


@dataclass(frozen=True)
class DotPlot:
    """A drawing of points."""

    across: str
    up: str
    dots: list[PlacedDot]
    kinds: list[tuple[str, int]]
    """Kind and colour."""
    columns: list[tuple[float, str]]
    """Place and label on the horizontal axis."""
    rows: list[tuple[float, str]]
    summary: str


def dot_plot(dots: Sequence[Dot], across: str, up: str) -> DotPlot:
    """Draw points.

    Args:
        dots: at least one.
        across: what the horizontal axis shows.
        up: what the vertical axis shows.
    """
    flat, tall = axis([dot.x for dot in dots]), axis([v for dot in dots for v in (dot.y - dot.spread, dot.y + dot.spread)])
    colours = {kind: i % COLOURS + 1 for i, kind in enumerate(dict.fromkeys(dot.kind for dot in dots))}

    def x(value: float) -> float:
        return round(LEFT + flat.place(value) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - tall.place(value) * (HEIGHT - TOP - BOTTOM), 1)

    placed = [
        PlacedDot(d, colours[d.kind], x(d.x), y(d.y), y(d.y + d.spread), y(d.y - d.spread))
        for d in sorted(dots, key=lambda d: d.x)
    ]
    titles = "; ".join(p.dot.title for p in placed)
    return DotPlot(
        across + (" (log scale)" if flat.log else ""), up, placed, list(colours.items()),
        [(round(LEFT + f * (WIDTH - LEFT - RIGHT), 1), text) for f, text in _ticks(flat)],
        [(round(HEIGHT - BOTTOM - f * (HEIGHT - TOP - BOTTOM), 1), text) for f, text in _ticks(tall)],
        f"{up} over {across}: {titles}",
    )  # fmt: skip


def _ticks(scale: Axis) -> list[tuple[float, str]]:
    return [(i / (len(scale.ticks) - 1), text) for i, text in enumerate(scale.ticks)]
