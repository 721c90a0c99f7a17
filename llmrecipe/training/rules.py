"""How one update is made. Back-propagation is the default rule; a wrapper may bring another (MeZO)."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llmrecipe.data.batch import Batch

if TYPE_CHECKING:
    from llmrecipe.training.run import Run


@dataclass
class StepResult:
    """What one optimizer step reports."""

    loss: float
    """The optimised mean loss, reduced over ranks, without penalties."""
    grad_norm: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    finite: bool = True
    """False when the loss or a gradient was NaN or infinite and nothing was updated."""


class UpdateRule(Protocol):
    """One optimizer step from its micro-batches; the parameters have moved when it returns."""

    def __call__(self, run: Run, micros: list[Batch]) -> StepResult:
        """Make one update."""


EXTREMES = ("_max", "_min")
"""Endings of metrics that are no means."""


class MetricSums:
    """name -> (sum, count), added up over micro-batches, then over ranks, divided once.

    Of a name that ends in `_max` or `_min` the largest or smallest value is kept, and its count is not looked at.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Any] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)
        self.extremes: dict[str, float] = {}

    def add(self, metrics: dict[str, tuple[Any, float]]) -> None:
        """Add one micro-batch."""
        for name, (value, count) in metrics.items():
            if name.endswith(EXTREMES):
                # The smallest value is kept as the largest of the negated ones.
                own = -float(value) if name.endswith("_min") else float(value)
                self.extremes[name] = max(self.extremes.get(name, -math.inf), own)
                continue
            self.sums[name] = self.sums[name] + (value.detach().double() if isinstance(value, torch.Tensor) else value)
            self.counts[name] += float(count)

    def mean(self, run: Run) -> dict[str, float]:
        """Means over all ranks; every rank must have seen the same names."""
        names = sorted(self.sums)
        ends = self._extremes(run)
        if not names:
            return ends
        flat = [float(self.sums[n]) for n in names] + [self.counts[n] for n in names]
        reduced = run.runtime.sum(torch.tensor(flat, dtype=torch.float64)).tolist()
        half = len(names)
        means = {n: reduced[i] / reduced[half + i] if reduced[half + i] else math.nan for i, n in enumerate(names)}
        return means | ends

    def _extremes(self, run: Run) -> dict[str, float]:
        names = sorted(self.extremes)
        if not names:
            return {}
        found = run.runtime.maximum(torch.tensor([self.extremes[n] for n in names], dtype=torch.float64)).tolist()
        return {n: math.nan if v == -math.inf else -v if n.endswith("_min") else v for n, v in zip(names, found, strict=True)}


def backprop(run: Run, micros: list[Batch]) -> StepResult:
    """theta <- optimizer(gradient of sum(loss) / sum(weight) + penalty).

    One denominator for the whole step: it is counted over all micro-batches and ranks before the first forward pass.
    Data-parallel wrappers average gradients over ranks, hence the factor `world`.
    """
    weight = max(run.total_weight(micros), 1e-12)
    sums = MetricSums()
    total = torch.zeros((), dtype=torch.float64)
    for index, micro in enumerate(micros):
        last = index == len(micros) - 1
        with run.runtime.sync(run.roles.prepared, last):
            loss = run.objective.loss(micro, run.roles)
            value = loss.total * (run.runtime.world / weight)
            if last:
                value = value + run.stack.penalty(run.model)
            value.backward()
        total += loss.total.detach().double().cpu()
        sums.add(loss.metrics)
    mean = float(run.runtime.sum(total.reshape(1))) / weight
    norm = run.clip()
    metrics = sums.mean(run)
    if not (_finite(mean) and _finite(norm)):
        run.optimizer.zero_grad(set_to_none=True)
        return StepResult(mean, norm, metrics, finite=False)
    run.stack.after_backward(run.model, run.progress.step)
    with run.stack.stepping(run.model, run.optimizer):
        run.optimizer.step()
    return StepResult(mean, norm, metrics)


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
