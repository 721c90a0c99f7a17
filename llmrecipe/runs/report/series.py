"""What a run's charts show: training and evaluation of one metric together, in groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmrecipe.core.score_intervals import Ends, with_ends
from llmrecipe.runs.run_record import Record

Point = tuple[int, float]
"""Step and value."""

TRAIN = "train"
SPLITS = {"eval": "evaluation", "test": "test", "general": "general", "forget": "forgetting"}
"""First part of the name of an evaluated metric -> name of its series."""
POINTS = 400
"""Most points that a chart draws of one series."""

LOSS, SCORES, REWARDS, SPEED, MEMORY, REST = "Loss", "Scores", "Rewards", "Speed", "Memory", "Everything else"
GROUPS = (LOSS, SCORES, REWARDS, SPEED, MEMORY, REST)
"""Groups in the order of the page; `REST` is folded."""
NAMED = {"nll": LOSS, "perplexity": LOSS, "kl": REWARDS, "tokens_per_s": SPEED, "mfu": SPEED, "peak_mem_mb": MEMORY}
NOT_DRAWN = ("tokens",)
"""Counters, which are no curve: the outcome names their last value."""


@dataclass
class Series:
    """One line of a chart."""

    name: str
    points: list[Point] = field(default_factory=list)
    ends: dict[int, Ends] = field(default_factory=dict)
    """Step -> ends of the value's confidence interval, where one was computed."""
    missing: int = 0
    """Steps whose value was not a finite number."""
    split: str = ""
    """`train`, or a value of `SPLITS`; the name where it is empty."""
    colour: int | None = None
    """Number of its colour from 0; by its place in the chart where it is None."""

    def __post_init__(self) -> None:
        self.split = self.split or self.name


@dataclass
class MetricCurves:
    """A metric with all of its series."""

    name: str
    series: dict[str, Series] = field(default_factory=dict)

    def one(self, name: str) -> Series:
        """Return the series of a name, a new one if there is none."""
        return self.series.setdefault(name, Series(name))

    @property
    def group(self) -> str:
        """Return the group the metric is shown in."""
        first = self.name.split("/")[0]
        if self.name in NAMED:
            return NAMED[self.name]
        if self.name.endswith("loss"):
            return LOSS
        if first.startswith("reward"):
            return REWARDS
        evaluated = any(series.split != TRAIN for series in self.series.values())
        return SCORES if evaluated and first != "logps" else REST

    @property
    def is_curve(self) -> bool:
        """Return whether a series has several values that differ; any other metric is shown as numbers."""
        return any(len({value for _, value in series.points}) > 1 for series in self.series.values())


def metric_curves(record: Record) -> list[MetricCurves]:
    """Return the metrics of a run by their order of appearance, each with what training and evaluations measured of it."""
    found: dict[str, MetricCurves] = {}
    for event in record.steps:
        for name, value in _values(event):
            if name not in NOT_DRAWN:
                _add(found.setdefault(name, MetricCurves(name)).one(TRAIN), event["step"], value)
    for event in record.evaluations:
        for name, (value, ends) in with_ends(dict(_values(event))).items():
            split, base = evaluated_name(name)
            series = found.setdefault(base, MetricCurves(base)).one(split)
            _add(series, event["step"], value)
            if ends is not None:
                series.ends[event["step"]] = ends
    for metric in found.values():
        metric.series = {name: series for name, series in metric.series.items() if series.points or series.missing}
    return [metric for metric in found.values() if any(series.points for series in metric.series.values())]


def evaluated_name(name: str) -> tuple[str, str]:
    """Return the series and the metric of a name in an evaluation.

    Examples:
        >>> evaluated_name("eval/rewards/margins"), evaluated_name("test/loss")
        (('evaluation', 'rewards/margins'), ('test', 'loss'))
    """
    first, _, rest = name.partition("/")
    return (SPLITS[first], rest) if first in SPLITS and rest else ("evaluation", name)


def grouped(metrics: Iterable[MetricCurves], first: str = "") -> dict[str, list[MetricCurves]]:
    """Return the metrics by group; the one named `first` leads its group."""
    groups: dict[str, list[MetricCurves]] = {group: [] for group in GROUPS}
    for metric in sorted(metrics, key=lambda metric: metric.name != first):
        groups[metric.group].append(metric)
    return {group: found for group, found in groups.items() if found}


def thinned(points: list[Point], most: int = POINTS) -> list[Point]:
    """Return at most `most` points with the same first, last, smallest and largest value.

    Of each of `most / 2 - 1` equal parts the smallest and the largest value are kept, so that no spike is lost.

    Examples:
        >>> thinned([(1, 0.0), (2, 1.0), (3, 9.0), (4, 1.0), (5, 0.0), (6, 2.0), (7, 3.0)], most=6)
        [(1, 0.0), (2, 1.0), (3, 9.0), (5, 0.0), (6, 2.0), (7, 3.0)]
    """
    if len(points) <= most:
        return points
    inner, parts = points[1:-1], most // 2 - 1
    kept = [points[0]]
    for part in range(parts):
        own = inner[part * len(inner) // parts : (part + 1) * len(inner) // parts]
        kept += sorted({min(own, key=lambda p: p[1]), max(own, key=lambda p: p[1])})
    return [*kept, points[-1]]


def _add(series: Series, step: int, value: Any) -> None:  # noqa: ANN401
    if isinstance(value, int | float) and math.isfinite(value):
        series.points.append((step, float(value)))
    else:
        series.missing += 1


def _values(event: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the numbers of an event by name; null, which stands for NaN and infinities, as None."""
    for name, value in event.items():
        number = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        if name not in ("event", "step") and number:
            yield name, value
