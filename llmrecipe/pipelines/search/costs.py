"""What a trial costs, and which of several trials are worth it.

A trial is on the front when no other is at least as good in score and in every cost, and better in one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmrecipe.core.errors import RunError
from llmrecipe.core.foreign import read_json, reading
from llmrecipe.models.checkpoint_path import DELTA_FILE
from llmrecipe.models.weight_headers import read_header
from llmrecipe.pipelines.search.trial import Trial
from llmrecipe.runs.run_record import read_run, seconds_of

Losses = Callable[[Trial], tuple[float, ...]]
"""Score and costs of a trial as numbers that are to be small."""


def costs_of(folder: Path, wanted: Sequence[str]) -> dict[str, float]:
    """Return costs of a finished run.

    parameters   numbers in its `final/delta.safetensors` (an MLP that made a prefix is gone), or all that trained
    memory       peak_mem_mb, the largest of all steps
    seconds      time of the training steps

    Raises:
        RunError: the run does not say.
    """
    record = read_run(folder) if set(wanted) - {"parameters"} else None
    found: dict[str, float] = {}
    for cost in wanted:
        if cost == "parameters":
            found[cost] = float(_left(folder))
        elif record is not None and cost == "memory":
            found[cost] = max((value for _, value in record.curve("peak_mem_mb")), default=math.nan)
        elif record is not None:
            found[cost] = seconds_of(record.steps)
    missing = [cost for cost, value in found.items() if math.isnan(value)]
    if missing:
        raise RunError(f"search.against: {folder} does not say its {missing[0]}")
    return found


def _left(folder: Path) -> int:
    """Return how many numbers a run leaves."""
    delta = folder / "final" / DELTA_FILE
    if delta.is_file():
        with reading(str(delta), "train the trial again"):
            return sum(math.prod(tensor["shape"]) for tensor in read_header(delta).values())
    report = folder / "report.json"
    if not report.is_file():
        raise RunError(f"search.against: {folder} has no report of what trained")
    found = read_json(report)
    with reading(str(report), "train the trial again"):
        return int(found["trained"]["parameters"])


def within_limits(trials: Sequence[Trial], limits: Mapping[Any, float]) -> list[Trial]:
    """Return the trials that cost no more than the limits.

    Raises:
        RunError: none does.
    """
    found = [t for t in trials if all(t.costs[key] <= most for key, most in limits.items())]
    if not found:
        cheapest = ", ".join(f"{key} {min(t.costs[key] for t in trials):g}" for key in limits)
        raise RunError(f"search.limits: every trial costs more; the cheapest: {cheapest}")
    return found


def front(trials: Sequence[Trial], losses: Losses) -> list[Trial]:
    """Return the trials that no other beats, the cheapest first; of equal ones the first that was tried."""
    kept: list[Trial] = []
    for trial in trials:
        own = losses(trial)
        others = [losses(other) for other in trials if other is not trial]
        beaten = any(all(a <= b for a, b in zip(o, own, strict=True)) and o != own for o in others)
        if not beaten and all(losses(other) != own for other in kept):
            kept.append(trial)
    return sorted(kept, key=lambda trial: losses(trial)[::-1])


def knee(trials: Sequence[Trial], losses: Losses) -> Trial:
    """Return the trial of a front that is nearest to the best of every loss, each scaled to 0 .. 1 over the front."""
    rows = [losses(trial) for trial in trials]
    low, high = ([choose(column) for column in zip(*rows, strict=True)] for choose in (min, max))

    def distance(row: tuple[float, ...]) -> float:
        return math.hypot(*((x - a) / (b - a) for x, a, b in zip(row, low, high, strict=True) if b > a))

    return trials[min(range(len(trials)), key=lambda i: distance(rows[i]))]


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Return the area that points dominate up to a reference; both losses are to be small.

    Examples:
        >>> hypervolume([(1.0, 2.0), (2.0, 1.0)], (3.0, 3.0))
        3.0
    """
    area, edge = 0.0, reference[1]
    for x, y in sorted(p for p in points if p[0] < reference[0] and p[1] < reference[1]):
        if y < edge:
            area += (reference[0] - x) * (edge - y)
            edge = y
    return area
