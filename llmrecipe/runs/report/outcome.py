"""What a run came to, in a minute: score before and after, what it cost, what it was made of, what was proved of it."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from llmrecipe.core.console import number
from llmrecipe.core.errors import RunError
from llmrecipe.core.foreign import read_json
from llmrecipe.core.score_intervals import LEVEL, with_interval
from llmrecipe.runs.report.series import TRAIN, MetricCurves, Series, evaluated_name
from llmrecipe.runs.run_dir import BEST, read_metrics
from llmrecipe.runs.run_record import Record, run_document, seconds_of
from llmrecipe.runs.verified import read_verified


@dataclass(frozen=True)
class Score:
    """One metric before and after training."""

    name: str
    before: str
    """Before the first step; empty where it was not measured."""
    best: str
    """At the step whose weights are the result."""
    last: str
    test: str
    """On the test split, with its interval."""


@dataclass
class Outcome:
    """The first section of a report."""

    state: str
    """done, running, failed or interrupted."""
    progress: str
    """`step 40 of 120`."""
    judged: Judged
    error: str = ""
    headline: Score | None = None
    headline_name: str = ""
    best_step: str = ""
    verdict: str = ""
    """`better by 0.62` or `worse by ...`, where it is known what is better."""
    facts: list[tuple[str, str]] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)


@dataclass(frozen=True)
class Judged:
    """What decided which weights are the result."""

    monitor: str
    mode: str | None
    """min, max, or None where that is not known."""
    step: int | None
    """Step of the best evaluation, or None where nothing was evaluated."""

    @property
    def metric(self) -> str:
        """Return the monitored metric without its split, as charts name it."""
        return evaluated_name(self.monitor)[1]


def outcome(record: Record, metrics: list[MetricCurves], report: dict[str, Any]) -> Outcome:
    """Return the outcome of a run.

    Args:
        metrics: what `series.metric_curves` returned.
        report: the run's `report.json`, empty where there is none.
    """
    status = record.status
    step, steps = record.steps[-1]["step"] if record.steps else 0, report.get("steps")
    progress, judged = f"step {step:,} of {steps:,}" if steps else f"step {step:,}", judge(record, metrics)
    found = Outcome(str(status.get("status")), progress, judged, str(status.get("error") or ""))
    found.best_step = f"{judged.step:,}" if judged.step is not None else ""
    found.scores = [_score(metric, judged.step) for metric in metrics if set(metric.series) - {TRAIN}]
    found.scores.sort(key=lambda score: score.name != judged.metric)
    lead = next((m for m in metrics if m.name == judged.metric), None) or next((m for m in metrics if m.name == "loss"), None)
    if lead is not None:
        found.headline, found.headline_name, found.verdict = _headline(lead, judged)
    found.facts = [(name, text) for name, text in _facts(record, report, judged, step) if text]
    return found


def judge(record: Record, metrics: list[MetricCurves]) -> Judged:
    """Return the monitored metric, whether a small or a large value is good, and the best step.

    The step is that of `final/metrics.json`; of an unfinished run, of its newest checkpoint or of the evaluations so far.
    """
    section = record.recipe.get("eval") or {}
    monitor = str(section.get("monitor") or "eval/loss")
    kept = _kept_judge(record.path)
    mode = section.get("mode") or kept.get("mode") or ("min" if monitor.endswith("loss") else None)
    base = evaluated_name(monitor)[1]
    series = next((m.series.get("evaluation") for m in metrics if m.name == base), None)
    step = read_metrics(record.path).get("best_step")
    if step is None and series is not None and series.points:
        pick = {"min": min, "max": max}.get(str(mode))
        step = pick(series.points, key=lambda p: p[1])[0] if pick is not None else kept.get("best_step")
    return Judged(monitor, mode, step)


def _kept_judge(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says about the best evaluation; empty where there is none."""
    for folder in ("checkpoints", BEST):
        for file in sorted((path / folder).glob("step-*/judge.json"), reverse=True):
            # A running training deletes old checkpoints at any time.
            with contextlib.suppress(RunError):
                return read_json(file)
    return {}


def _headline(metric: MetricCurves, judged: Judged) -> tuple[Score, str, str]:
    """Return the score of the headline, its full name, and whether it became better."""
    evaluated = metric.series.get("evaluation")
    if evaluated is None or not evaluated.points:
        points = (metric.series.get(TRAIN) or next(iter(metric.series.values()))).points
        first, last = points[0][1], points[-1][1]
        test = metric.series.get("test")
        return Score(metric.name, number(first), number(last), number(last), _last(test)), f"training {metric.name}", ""
    score = _score(metric, judged.step)
    before, best = _at(evaluated, 0), _at(evaluated, judged.step)
    if before is None or best is None or judged.mode is None:
        return score, judged.monitor, ""
    gain = (before - best) if judged.mode == "min" else (best - before)
    verdict = f"better by {number(gain)}" if gain > 0 else f"worse by {number(-gain)}" if gain < 0 else "unchanged"
    return score, judged.monitor, verdict


def _score(metric: MetricCurves, best_step: int | None) -> Score:
    evaluated = metric.series.get("evaluation") or Series("evaluation")
    other = next((s for name, s in metric.series.items() if name not in (TRAIN, "evaluation")), None)
    points = evaluated.points
    return Score(
        metric.name, _text(evaluated, 0), _text(evaluated, best_step), _text(evaluated, points[-1][0] if points else None),
        _last(other),
    )  # fmt: skip


def _at(series: Series, step: int | None) -> float | None:
    return next((value for at, value in reversed(series.points) if at == step), None)


def _text(series: Series, step: int | None) -> str:
    value = _at(series, step)
    return "" if value is None or step is None else with_interval(value, series.ends.get(step), number)


def _last(series: Series | None) -> str:
    return "" if series is None or not series.points else _text(series, series.points[-1][0])


def _facts(record: Record, report: dict[str, Any], judged: Judged, step: int) -> list[tuple[str, str]]:
    tokens, memory = record.last("tokens"), max((v for _, v in record.curve("peak_mem_mb")), default=None)
    cost = [f"{tokens:,.0f} tokens" if tokens else "", f"{number(memory)} MB at the peak" if memory is not None else ""]
    best = f"{judged.step:,} of {step:,}" if judged.step is not None else ""
    interval = any(name.endswith("/low") for event in record.evaluations for name in event)
    return [
        ("Best step", best),
        ("Duration", _duration(record)),
        ("Cost", ", ".join(part for part in cost if part)),
        ("Model", model_line(record, report)),
        ("Data", data_line(record, report)),
        ("Objective", str((record.recipe.get("objective") or {}).get("kind") or "")),
        *proofs(report),
        ("Verified", verified_line(record)),
        ("Intervals", f"{LEVEL:.0%}, from resampled rows" if interval else ""),
        ("Warnings", f"{len(record.warnings)}, below" if record.warnings else "none"),
    ]


def model_line(record: Record, report: dict[str, Any]) -> str:
    """Return model, method and how much of it trained, in one line."""
    path = (record.recipe.get("model") or {}).get("path")
    if path is None:
        return ""
    stack = "+".join(str(kind) for kind in report.get("stack", {}).values()) or "every weight"
    if not report.get("parameters"):
        return f"{path}, {stack}"
    trained, whole = report["trained"]["parameters"], report["parameters"]
    # Reports of earlier versions do not have the base's own count.
    base = report.get("base_parameters", whole)
    return f"{path}, {base:,} parameters; {stack} trains {trained:,} ({trained / whole:.2%})"


def data_line(record: Record, report: dict[str, Any]) -> str:
    """Return the training rows in one line."""
    path = (record.recipe.get("data") or {}).get("path")
    if path is None:
        return ""
    source, data = ", ".join(map(str, path)) if isinstance(path, list | dict) else str(path), report.get("data") or {}
    if not data.get("kept"):
        return source
    return f"{source}, {data['kept']:,} of {data['read']:,} rows, {data['tokens']:,} tokens, format {data['format']}"


def proofs(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what the run proved of itself, a line for the values before the first step and one for the first update."""
    proved, lines = report.get("proved") or {}, []
    if "step_zero" in proved:
        values = ", ".join(f"{name} {number(value)}" for name, value in proved["step_zero"].items())
        lines.append(("Proved before step 1", f"{values}, as it must be while policy and reference are the same model"))
    if "frozen" in proved:
        frozen, trained, keys = proved["frozen"], proved["trained"], proved.get("keys") or {}
        text = f"{frozen['unchanged']:,} of {frozen['tensors']:,} frozen tensors unchanged, "
        still = ", the others had no gradient yet" if trained["changed"] < trained["tensors"] else ""
        text += f"{trained['changed']:,} of {trained['tensors']:,} trained ones moved{still}, {proved['hooks']:,} hooks called"
        text += f", {keys['read']} of {keys['set']} recipe keys read" if keys else ""
        lines.append((f"Proved at step {proved['step']}", text))
    return lines


def verified_line(record: Record) -> str:
    """Return what `llmrecipe verify` found, in one line; empty for a run that cannot be verified yet."""
    found = read_verified(record.path)
    if not found:
        return f"not yet: llmrecipe verify {record.path}" if (record.path / "final").is_dir() else ""
    results = Counter(str(line["result"]) for line in found["lines"])
    counts = ", ".join(f"{count} {result}" for result, count in sorted(results.items(), key=lambda item: item[0] != "failed"))
    return f"{counts}; at step {found['step']}, {found['time']}"


def _duration(record: Record) -> str:
    """Return the time of the training steps, and from the start to the end where both are known."""
    seconds = seconds_of(record.steps)
    parts = [f"{duration(seconds)} of training steps"] if seconds else []
    started = run_document(record.path, "environment.json")
    try:
        whole = datetime.fromisoformat(record.status["time"]) - datetime.fromisoformat(started["started"])
    except (KeyError, TypeError, ValueError):
        return ", ".join(parts)
    return ", ".join([*parts, f"{duration(whole.total_seconds())} from start to end"])


def duration(seconds: float) -> str:
    """Return a time in two units.

    Examples:
        >>> duration(0.42), duration(200), duration(7500), duration(200000)
        ('0.42 s', '3 min 20 s', '2 h 5 min', '2 d 7 h')
    """
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {int(seconds % 60)} s"
