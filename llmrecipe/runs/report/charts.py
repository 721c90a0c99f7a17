"""Line charts as SVG paths and labels, which `assets/report/parts.html` puts together.

The charts are drawn here, in about two hundred lines, because no kept plotting library fits a page that is one file: matplotlib
draws pictures without values under the pointer and in the colours of one theme, and the libraries that draw in the browser
(Plotly, Bokeh, Vega) add one to five megabytes of script to every report. Paths are stretched to the width of the screen, so
axis labels are HTML and keep the size of text on a phone; `assets/report/script.js` reads values off `Chart.data`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmrecipe.core.console import number
from llmrecipe.core.score_intervals import with_interval
from llmrecipe.runs.report.series import TRAIN, MetricCurves, Point, Series, thinned

WIDTH, HEIGHT = 1000, 300
"""Units of the drawing, which is stretched to the space there is."""
LOGARITHMIC = 50.0
"""Ratio of the largest value to the smallest from which a logarithmic scale shows more."""
MARKED = 40
"""Most points of a series that are also marked one by one."""
ROWS = 10
"""Most rows of a chart's table of values."""
COLOURS = 6
"""Colours of lines in the style sheet."""


@dataclass(frozen=True)
class Axis:
    """A scale with evenly spaced ticks."""

    low: float
    high: float
    log: bool
    ticks: list[str]
    """Labels from the lowest to the highest."""

    def place(self, value: float) -> float:
        """Return where a value is: 0 at the low end, 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class DrawnLine:
    """One series of a chart."""

    name: str
    colour: int
    """1 to `COLOURS`."""
    dashed: bool
    path: str
    marks: str
    """Path of the single points."""
    said: str
    """First and last value, or the only one."""


@dataclass(frozen=True)
class Chart:
    """One chart."""

    name: str
    lines: list[DrawnLine]
    log: bool
    rows: list[str]
    """Labels of the vertical axis from the top."""
    columns: list[str]
    """Labels of the horizontal axis."""
    summary: str
    """What the chart shows, in a sentence."""
    data: str
    """JSON for the script: `x` (first and last step) and `series` (name, points)."""
    table: list[list[str]]
    """Header and rows of some of the values."""
    notes: list[str]


def chart(metric: MetricCurves) -> Chart:
    """Draw a metric: training solid, everything else dashed."""
    every = [series for series in metric.series.values() if series.points]
    shown = {series.name: thinned(series.points) for series in every}
    values = [value for points in shown.values() for _, value in points]
    steps = sorted({step for points in shown.values() for step, _ in points})
    up, first, last = axis(values), steps[0], steps[-1]
    lines = [
        _line(series, shown[series.name], place if series.colour is None else series.colour, _placer(up, first, last))
        for place, series in enumerate(every)
    ]
    data = {"x": [first, last], "series": [[series.name, shown[series.name]] for series in every]}
    return Chart(
        metric.name, lines, up.log, up.ticks[::-1], _columns(first, last), _summary(metric.name, every, up.log),
        json.dumps(data), _table(every, shown, steps), _notes(every),
    )  # fmt: skip


def axis(values: Sequence[float]) -> Axis:
    """Return a scale for values: logarithmic where they are positive and spread over more than a factor of 50.

    Examples:
        >>> axis([0.1, 0.69]).ticks, axis([2.0, 900.0]).ticks
        (['0', '0.2', '0.4', '0.6', '0.8'], ['1', '10', '100', '1,000'])
    """
    low, high = min(values), max(values)
    if low > 0 and high / low >= LOGARITHMIC:
        bottom, top = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
        stride = max(1, -(-(top - bottom) // 5))
        top = bottom + stride * -(-(top - bottom) // stride)
        return Axis(10.0**bottom, 10.0**top, True, [_label(10.0**p) for p in range(bottom, top + 1, stride)])
    span = (high - low) or abs(high) or 1.0
    raw = span / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return Axis(first * step, last * step, False, [_label(round(i * step, 12)) for i in range(first, last + 1)])


def series_text(series: Series) -> str:
    """Return a series in words: `0.6931 → 0.1068`, or its only value with its interval."""
    first, last = series.points[0], series.points[-1]
    end = with_interval(last[1], series.ends.get(last[0]), number)
    if len(series.points) == 1:
        return end
    if len({value for _, value in series.points}) == 1:
        return f"{number(last[1])} at all of {len(series.points)} points"
    return f"{number(first[1])} → {end}"


def _placer(up: Axis, first: int, last: int) -> Callable[[Point], tuple[float, float]]:
    def place(point: Point) -> tuple[float, float]:
        across = (point[0] - first) / (last - first) if last > first else 0.5
        return round(across * WIDTH, 1), round((1 - up.place(point[1])) * HEIGHT, 1)

    return place


def _line(series: Series, points: list[Point], colour: int, place: Callable[[Point], tuple[float, float]]) -> DrawnLine:
    places = [place(point) for point in points]
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
    marks = "".join(f"M{x:g} {y:g}h0" for x, y in places) if len(points) <= MARKED else ""
    return DrawnLine(series.name, colour % COLOURS + 1, series.split != TRAIN, path, marks, series_text(series))


def _columns(first: int, last: int) -> list[str]:
    """Return evenly spaced steps, the first and the last among them: as many as are whole numbers, at most five."""
    parts = next((n for n in (4, 3, 2) if last > first and (last - first) % n == 0), 1)
    return [f"{first + i * (last - first) // parts:,}" for i in range(parts + 1)] if last > first else [f"{first:,}"]


def _summary(name: str, every: list[Series], log: bool) -> str:
    parts = []
    for series in every:
        (low_step, low), (high_step, high) = (pick(series.points, key=lambda p: p[1]) for pick in (min, max))
        text = f"{series.name} {series_text(series)}"
        if len(series.points) > 1:
            text += f", lowest {number(low)} at step {low_step}, highest {number(high)} at step {high_step}"
        parts.append(text)
    return f"{name} over steps{', logarithmic scale' if log else ''}: {'; '.join(parts)}"


def _table(every: list[Series], shown: dict[str, list[Point]], steps: list[int]) -> list[list[str]]:
    """Return header and rows for some steps: those of the shortest series, or evenly spaced ones."""
    least = min((series.name for series in every), key=lambda name: (len(shown[name]) < 2, len(shown[name])))
    own = [step for step, _ in shown[least]] if 2 <= len(shown[least]) <= ROWS else steps
    count = min(ROWS, len(own))
    picked = sorted({own[i * (len(own) - 1) // max(1, count - 1)] for i in range(count)} | {steps[-1]})
    known = {name: dict(points) for name, points in shown.items()}
    body = [[f"{step:,}", *(number(known[s.name].get(step)) for s in every)] for step in picked]
    return [["step", *(series.name for series in every)], *body]


def _notes(every: list[Series]) -> list[str]:
    return [f"{s.name}: {s.missing} without a finite number" for s in every if s.missing]


def _label(value: float) -> str:
    return number(int(value) if value == int(value) and abs(value) < 1e15 else value)
