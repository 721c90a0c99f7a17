"""The page of several runs: where they ended, what differs in their recipes, their curves in common charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llmrecipe.core.console import number, value_text
from llmrecipe.runs.report.outcome import Outcome, duration, outcome
from llmrecipe.runs.report.page import chart_groups
from llmrecipe.runs.report.render import render
from llmrecipe.runs.report.series import MetricCurves, evaluated_name, metric_curves
from llmrecipe.runs.run_record import Record, differences, run_document, seconds_of

SECTIONS = [("outcome", "Outcome"), ("differences", "Differences"), ("curves", "Curves"), ("warnings", "Warnings")]


def several_page(records: Sequence[Record], metrics: Sequence[str] = ()) -> str:
    """Return a comparison as one HTML page.

    Args:
        records: runs with different names.
        metrics: names to draw, such as loss or eval/loss (training and evaluation share a chart); all by default.
    """
    reports = [run_document(record.path, "report.json") for record in records]
    measured = [metric_curves(record) for record in records]
    outcomes = list(map(outcome, records, measured, reports))
    curves = common_curves(records, measured)
    wanted = {name for metric in metrics for name in (metric, evaluated_name(metric)[1])}
    drawn = [curve for curve in curves if curve.name in wanted] if wanted else curves
    monitored = outcomes[0].judged.metric if outcomes else ""
    differ = differences(list(records))
    names = [record.name for record in records]
    return render(
        "several.html", f"Comparison of {len(records)} run{'s' if len(records) != 1 else ''}", sections=SECTIONS,
        outcome=[["run", *HEAD], *map(_row, records, outcomes, reports)],
        differences=[["key", *names], *([key, *map(value_text, values)] for key, values in differ.items())] if differ else [],
        groups=chart_groups(drawn, monitored), main=monitored,
        warnings=[["run", "step", "warning"], *([r.name, f"{w['step']:,}", w["message"]] for r in records for w in r.warnings)],
    )  # fmt: skip


HEAD = (
    "status",
    "score",
    "before",
    "best",
    "best step",
    "other splits",
    "loss",
    "tokens",
    "time",
    "tokens/s",
    "peak MB",
    "trained",
)


def _row(record: Record, found: Outcome, report: Mapping[str, Any]) -> list[str]:
    score, facts, seconds = found.headline, record.facts(), seconds_of(record.steps)
    trained = (report.get("trained") or {}).get("parameters")
    scores = [found.headline_name, score.before, score.best or score.last, found.best_step, score.test] if score else [""] * 5
    return [
        record.name, found.state, *scores, number(facts["loss"]), number(facts["tokens"]),
        duration(seconds) if seconds else "-", number(facts["tokens_per_s"]), number(facts["peak_mem_mb"]), number(trained),
    ]  # fmt: skip


def common_curves(records: Sequence[Record], measured: Sequence[Sequence[MetricCurves]]) -> list[MetricCurves]:
    """Return the metrics of all runs, each with the series of every run that has it, named `RUN SPLIT`.

    Args:
        measured: what `metric_curves` returned for each run.
    """
    found: dict[str, MetricCurves] = {}
    for place, (record, metrics) in enumerate(zip(records, measured, strict=True)):
        for metric in metrics:
            common = found.setdefault(metric.name, MetricCurves(metric.name))
            for series in metric.series.values():
                name = f"{record.name} {series.split}"
                common.series[name] = replace(series, name=name, colour=place)
    return list(found.values())
