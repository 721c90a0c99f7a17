"""The page of one run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from llmrecipe.core.console import number
from llmrecipe.core.foreign import read_json
from llmrecipe.core.score_intervals import shown
from llmrecipe.runs.report.charts import Chart, chart, series_text
from llmrecipe.runs.report.maps import grid_map
from llmrecipe.runs.report.outcome import judge, outcome
from llmrecipe.runs.report.render import render
from llmrecipe.runs.report.series import REST, MetricCurves, evaluated_name, grouped, metric_curves
from llmrecipe.runs.run_record import flat, read_run

SECTIONS = [
    ("outcome", "Outcome"),
    ("curves", "Curves"),
    ("samples", "Samples"),
    ("choices", "Where the method trained"),
    ("recipe", "Recipe"),
    ("warnings", "Warnings"),
    ("environment", "Environment"),
]
"""Anchor and heading of each section, in order."""


@dataclass
class ChartGroup:
    """Metrics that are shown together."""

    name: str
    charts: list[Chart] = field(default_factory=list)
    tiles: list[tuple[str, str]] = field(default_factory=list)
    """Name and values of metrics that are no curve."""

    @property
    def folded(self) -> bool:
        """Return whether the group is shown only on request."""
        return self.name == REST


def run_page(path: Path, live: bool = False) -> str:
    """Return the report of a run as one HTML page.

    Args:
        live: the page is served and reads itself again.

    Raises:
        RunError: there is no run at the path, or one of its files is damaged.
    """
    record = read_run(path)
    report = _document(path, "report.json")
    metrics = metric_curves(record)
    monitored = evaluated_name(judge(record, metrics).monitor)[1]
    found = outcome(record, metrics, report)
    scores = [["metric", "before", "best step", "last step", "other splits"], *(list(astuple(s)) for s in found.scores)]
    return render(
        "run.html", record.name, live, sections=SECTIONS, outcome=found, scores=scores, main=monitored,
        groups=chart_groups(metrics, monitored), samples=_events(record.samples),
        maps=[grid_map(title, made) for title, made in report.get("grids", {}).items()],
        recipe=_text(path, "recipe.yaml"), command=_text(path, "command.txt"), environment=_environment(path),
        warnings=[["step", "warning"], *([f"{w['step']:,}", w["message"]] for w in record.warnings)] if record.warnings else [],
    )  # fmt: skip


def chart_groups(metrics: Sequence[MetricCurves], first: str = "") -> list[ChartGroup]:
    """Return charts and numbers by group, the metric named `first` before the others of its group."""
    made = []
    for name, members in grouped(metrics, first).items():
        group = ChartGroup(name)
        for metric in members:
            if metric.is_curve:
                group.charts.append(chart(metric))
            else:
                group.tiles.append((metric.name, _numbers(metric)))
        made.append(group)
    return made


def _numbers(metric: MetricCurves) -> str:
    """Return the series of a metric that has no curve as text."""
    found = [series for series in metric.series.values() if series.points]
    steps = {step for series in found for step, _ in series.points}
    at = f" (step {next(iter(steps)):,})" if len(steps) == 1 else ""
    return ", ".join(f"{series.name} {series_text(series)}" for series in found) + at


def _events(events: Sequence[dict[str, Any]]) -> list[list[str]]:
    texts = [shown({k: v for k, v in e.items() if k != "event"}, number) for e in events]
    columns = list(dict.fromkeys(k for row in texts for k in row))
    return [columns, *([row.get(c, "") for c in columns] for row in texts)] if texts else []


def _environment(path: Path) -> list[tuple[str, str]]:
    values = flat(_document(path, "environment.json"))
    return [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in values.items() if name]


def _document(path: Path, name: str) -> dict[str, Any]:
    return dict(read_json(path / name, "a part of the report cannot be read")) if (path / name).is_file() else {}


def _text(path: Path, name: str) -> str:
    return (path / name).read_text(encoding="utf-8", errors="replace") if (path / name).is_file() else ""
