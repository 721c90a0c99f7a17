"""One point of a search that was tried."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Trial:
    """One point that was tried."""

    number: int
    point: dict[str, Any]
    values: list[float] = field(default_factory=list)
    """The monitored metric of each seed's run."""
    state: str = "done"
    """done, pruned or failed."""
    costs: dict[str, float] = field(default_factory=dict)
    """Mean over the seeds of each cost of `against`."""
    dirs: list[str] = field(default_factory=list)
    reports: dict[int, float] = field(default_factory=dict)
    """Step -> the monitored metric of the first seed, as the pruner saw it."""
    rungs: dict[str, float] = field(default_factory=dict)
    """Record of the pruner: the value with which the trial passed each rung."""
    generations: dict[str, int] = field(default_factory=dict)
    """Record of the sampler: the generation in which the trial was chosen, under Optuna's key."""

    @property
    def value(self) -> float | None:
        """Return the mean over the seeds."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Return the standard deviation over the seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None
