"""Comparison of runs, read from their folders: recipe, status and events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrecipe.core.errors import RunError, did_you_mean
from llmrecipe.core.foreign import read_json, reading
from llmrecipe.core.score_intervals import normal_ends
from llmrecipe.runs.events import FILE, read_events
from llmrecipe.runs.looks import read_looks
from llmrecipe.runs.run_dir import RunDir
from llmrecipe.runs.run_names import run_title

SILENT = ("run", "log")
"""Recipe keys of folders and displays, which do not affect training."""


TASK_SCORES = "tasks.json"
"""File of a run with its scores on tasks of lm-evaluation-harness."""


@dataclass
class Record:
    """One run."""

    path: Path
    name: str
    status: dict[str, Any]
    recipe: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)

    def curve(self, metric: str, null: float | None = None) -> list[tuple[int, float]]:
        """Return (step, value) of a metric of steps or evaluations.

        Args:
            null: stands for a value that was no number; None leaves its step out.
        """
        values = [
            (e["step"], null if e[metric] is None else e[metric]) for e in (*self.steps, *self.evaluations) if metric in e
        ]
        return [(step, float(value)) for step, value in values if isinstance(value, int | float)]

    def metrics(self) -> list[str]:
        """Return the names with a curve, in the order of their first appearance."""
        names: dict[str, None] = {}
        for event in (*self.steps, *self.evaluations):
            names |= {k: None for k, v in event.items() if k not in ("event", "step") and isinstance(v, int | float)}
        return list(names)

    def last(self, metric: str) -> float | None:
        """Return the last value of a metric."""
        curve = self.curve(metric)
        return curve[-1][1] if curve else None

    def facts(self) -> dict[str, Any]:
        """Return one row of the comparison: status, steps, speed, memory, and the last value of every other metric."""
        speeds = sorted(v for _, v in self.curve("tokens_per_s"))
        facts: dict[str, Any] = {
            "status": self.status.get("status"),
            "steps": self.steps[-1]["step"] if self.steps else 0,
            "loss": self.last("loss"),
        }
        facts |= {m: self.last(m) for m in self.metrics() if "/" in m}
        for task, scores in read_task_scores(self.path).items():
            for metric, value in scores["metrics"].items():
                facts |= {f"{task}/{metric}": value, **normal_ends(f"{task}/{metric}", value, scores["errors"].get(metric))}
        if looks := read_looks(self.path):
            facts["test_looks"] = len(looks)
        facts |= {"tokens": self.last("tokens"), "tokens_per_s": speeds[len(speeds) // 2] if speeds else None}
        return facts | {"peak_mem_mb": max((v for _, v in self.curve("peak_mem_mb")), default=None)}


def seconds_of(steps: Sequence[Mapping[str, Any]]) -> float:
    """Compute the sum over steps of tokens / (tokens per second); `tokens` in the events counts from the start."""
    total, before = 0.0, 0.0
    for step in steps:
        tokens = float(step.get("tokens") or before)
        if step.get("tokens_per_s"):
            total += (tokens - before) / float(step["tokens_per_s"])
        before = tokens
    return total


def read_task_scores(run: Path) -> dict[str, dict[str, Any]]:
    """Return a run's scores on tasks of lm-evaluation-harness by task; nothing where none were computed.

    Raises:
        RunError: the file is damaged.
    """
    file = run / TASK_SCORES
    if not file.is_file():
        return {}
    remedy = "remove it and score the tasks again"
    found: dict[str, dict[str, Any]] = read_json(file, "", remedy)
    with reading(str(file), remedy):
        return {task: {**scores, "metrics": dict(scores["metrics"])} for task, scores in found.items()}


def run_document(path: Path, name: str) -> dict[str, Any]:
    """Return a JSON file of a run; empty where there is none.

    Raises:
        RunError: it is damaged.
    """
    return dict(read_json(path / name, "a part of the report cannot be read")) if (path / name).is_file() else {}


def read_run(path: str | Path) -> Record:
    """Read one run.

    Raises:
        RunError: there is no run at the path.
    """
    run = RunDir.open(path, write=False)
    events = read_events(run.path) if (run.path / FILE).is_file() else []
    record = Record(run.path, run_title(run.path.resolve()), run.read_status(), run.recipe())
    lists = {"step": record.steps, "evaluation": record.evaluations, "sample": record.samples, "warning": record.warnings}
    for event in events:
        if event.get("event") in lists:
            lists[event["event"]].append(event)
    return record


def read_runs(paths: list[str]) -> list[Record]:
    """Read several runs and give each the shortest name that is unique among them."""
    if not paths:
        raise RunError("name at least one run directory")
    records = [read_run(p) for p in paths]
    places = [record.path.resolve() for record in records]
    names = [run_title(place) for place in places]
    for depth in range(1, 4):
        if len(set(names)) == len(names):
            break
        names = ["/".join(place.parts[-depth:]) for place in places]
    for record, name in zip(records, names, strict=True):
        record.name = name
    return records


def differences(records: list[Record]) -> dict[str, list[Any]]:
    """Return the recipe keys whose values differ between runs: key path -> the value in each."""
    recipes = [flat({k: v for k, v in r.recipe.items() if k not in SILENT}) for r in records]
    keys = sorted({key for values in recipes for key in values})
    rows = {key: [values.get(key) for values in recipes] for key in keys}
    return {key: values for key, values in rows.items() if any(v != values[0] for v in values)}


def check_metric(records: list[Record], metric: str) -> None:
    """Refuse a metric that no run has.

    Raises:
        RunError: with the available names.
    """
    known = list(dict.fromkeys(m for r in records for m in r.metrics()))
    if metric not in known:
        raise RunError(
            f"no run has a metric '{metric}'{did_you_mean(metric, known)} (there are: {', '.join(known) or 'none yet'})"
        )


def flat(value: object, at: str = "") -> dict[str, Any]:
    """Flatten nested mappings: key path with dots -> value."""
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in flat(item, f"{at}.{key}" if at else str(key)).items()}
    return {at: value}
