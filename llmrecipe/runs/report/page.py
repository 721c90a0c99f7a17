"""The page of one run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from llmrecipe.core.console import number, value_text
from llmrecipe.data.token_report import Report
from llmrecipe.runs.report.charts import Chart, chart, series_text
from llmrecipe.runs.report.outcome import outcome
from llmrecipe.runs.report.recipe_view import recipe_view
from llmrecipe.runs.report.render import render
from llmrecipe.runs.report.samples import sampled_prompts
from llmrecipe.runs.report.series import REST, MetricCurves, grouped, metric_curves
from llmrecipe.runs.report.where_trained import where_trained
from llmrecipe.runs.run_record import flat, read_run, run_document
from llmrecipe.runs.verified import read_verified

SECTIONS = [
    ("outcome", "Outcome"),
    ("curves", "Curves"),
    ("memory", "Memory"),
    ("samples", "Samples"),
    ("choices", "Where the method trained"),
    ("recipe", "Recipe"),
    ("data", "Data"),
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


def run_page(path: Path, live: bool = False, predicted: Mapping[str, int] | None = None) -> str:
    """Return the report of a run as one HTML page.

    Args:
        live: the page is served and reads itself again.
        predicted: bytes of each part of its memory, as `check` gives them.

    Raises:
        RunError: there is no run at the path, or one of its files is damaged.
    """
    record = read_run(path)
    report = run_document(path, "report.json")
    metrics = metric_curves(record)
    found = outcome(record, metrics, report)
    command = _text(path, "command.txt")
    scores = [["metric", "before", "best step", "last step", "other splits"], *(list(astuple(s)) for s in found.scores)]
    return render(
        "run.html", record.name, live, sections=SECTIONS, outcome=found, scores=scores, main=found.judged.metric,
        groups=chart_groups(metrics, found.judged.metric), memory=memory_table(report.get("memory", {}), predicted or {}),
        samples=sampled_prompts(record.samples), verified=_verified(path), maps=where_trained(path, report),
        recipe=recipe_view(record, report, _text(path, "recipe.yaml"), command), data=audit_facts(report), command=command,
        environment=_environment(path),
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


def memory_table(measured: Mapping[str, int], predicted: Mapping[str, int]) -> list[list[str]]:
    """Return the parts of a run's memory in MB, as predicted and as measured, the peak last; nothing where none was counted.

    The predicted peak is that of tensors, which a process or a device exceeds by what its allocator keeps.
    """
    names = [*(n for n in dict.fromkeys((*measured, *predicted)) if n != "peak"), "peak"] if measured else []

    def size(found: Mapping[str, int], name: str) -> str:
        return f"{found[name] / 2**20:,.3f}" if name in found else "unknown"

    lines = [[n, size(predicted, n), size(measured, n)] for n in names]
    if lines and "peak" in predicted:
        lines[-1][1] = f"at least {lines[-1][1]}"
    return [["MB", "predicted", "measured"], *lines] if lines else []


def _numbers(metric: MetricCurves) -> str:
    """Return the series of a metric that has no curve as text."""
    found = [series for series in metric.series.values() if series.points]
    steps = {step for series in found for step, _ in series.points}
    at = f" (step {next(iter(steps)):,})" if len(steps) == 1 else ""
    return ", ".join(f"{series.name} {series_text(series)}" for series in found) + at


def audit_facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what was read of the data, what was dropped and why, as at the start of the run."""
    if not report.get("data"):
        return []
    facts: list[tuple[str, str]] = []
    for line in Report.from_dict(report["data"]).lines():
        name, _, text = line.partition(": ")
        facts.append(("dropped", line.strip()) if line.startswith(" ") else (name, text))
    return facts + [(f"tokenizer {name}", value_text(value)) for name, value in (report.get("tokenizer") or {}).items()]


def _verified(path: Path) -> list[list[str]]:
    """Return the comparisons of `llmrecipe verify` with a header; empty where there are none."""
    lines = read_verified(path).get("lines", [])
    rows = []
    for x in lines:
        text = ": ".join(part for part in (x["compared"], x["reason"]) if part)
        rows.append([x["check"], x["result"], number(x["difference"]), number(x["bound"]), text])
    return [["check", "result", "difference", "bound", "compared"], *rows] if rows else []


def _environment(path: Path) -> list[tuple[str, str]]:
    values = flat(run_document(path, "environment.json"))
    return [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in values.items() if name]


def _text(path: Path, name: str) -> str:
    return (path / name).read_text(encoding="utf-8", errors="replace") if (path / name).is_file() else ""
