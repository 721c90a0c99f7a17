"""How one update is made. Back-propagation is the default rule; a wrapper may bring another (MeZO)."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from llmrecipe.data.collate import Batch
from llmrecipe.models.hooks.shared_weights import shared_weights

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from llmrecipe.models.pretrained import LanguageModel


class Processes(Protocol):
    """What an update rule needs from the processes of a run."""

    rank: int
    world: int

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""

    def maximum(self, tensor: Tensor) -> Tensor:
        """Return the elementwise maximum of a tensor over all processes."""

    def passes(self, own: int) -> int:
        """Return how many forward passes this process has to make for `own` of its own."""

    def sync(self, module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which gradients are reduced over processes only for the last micro-batch."""


class LifecycleHooks(Protocol):
    """What an update rule needs from the stack."""

    def penalty(self, model: nn.Module) -> Tensor | float:
        """Return the extra loss of the stack's methods."""

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Let methods change gradients."""

    def stepping(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> contextlib.AbstractContextManager[Any]:
        """Return a context around the optimizer's own step."""

    def groups(self, model: nn.Module) -> list[Any]:
        """Return parameters with their own learning rate or decay."""

    def __iter__(self) -> Iterator[Any]: ...


@dataclass(frozen=True)
class StepContext:
    """What one update may use of a run."""

    step: int
    """Optimizer steps made so far."""
    steps: int
    """Optimizer steps of the whole run."""
    learning_rate: float
    seed: int
    folder: Path
    """The run's directory, for a rule's own files."""
    model: LanguageModel
    stack: LifecycleHooks
    optimizer: Any
    """The torch optimizer; None where the rule brings its own."""
    objective: Any
    roles: Any
    runtime: Processes
    weight: Callable[[list[Batch]], float]
    """The denominator of a step, over all its micro-batches and processes."""
    clip: Callable[[], float]
    """Clips the gradient norm over everything that trains; returns the norm before clipping."""


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

    def __call__(self, context: StepContext, micros: list[Batch]) -> StepResult:
        """Make one update."""


class Largest(NamedTuple):
    """A metric of which the largest value is kept over micro-batches and processes, not the mean."""

    value: Any
    seen: float = 1.0
    """Number of items it is the extreme of; 0: there is no value here."""


class Smallest(NamedTuple):
    """A metric of which the smallest value is kept over micro-batches and processes, not the mean."""

    value: Any
    seen: float = 1.0
    """Number of items it is the extreme of; 0: there is no value here."""


class MetricSums:
    """name -> (sum, count), added up over micro-batches, then over ranks, divided once.

    Of a metric that is given as `Largest` or `Smallest` that value is kept; nan where no process has one.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Any] = defaultdict(float)
        self.counts: dict[str, float] = defaultdict(float)
        self.extremes: dict[str, tuple[float, float]] = {}
        """Name -> (sign, the largest of sign * value): the smallest value is the largest of the negated ones."""

    def add(self, metrics: Mapping[str, tuple[Any, float]]) -> None:
        """Add one micro-batch."""
        for name, entry in metrics.items():
            value, count = entry
            if isinstance(entry, Largest | Smallest):
                sign = 1.0 if isinstance(entry, Largest) else -1.0
                own = sign * float(value) if count else -math.inf
                self.extremes[name] = (sign, max(self.extremes.get(name, (sign, -math.inf))[1], own))
                continue
            self.sums[name] = self.sums[name] + (value.detach().double() if isinstance(value, torch.Tensor) else value)
            self.counts[name] += float(count)

    def mean(self, runtime: Processes) -> dict[str, float]:
        """Return means over all ranks; every rank must have seen the same names."""
        names = sorted(self.sums)
        extremes = self._extremes(runtime)
        if not names:
            return extremes
        flat = [float(self.sums[n]) for n in names] + [self.counts[n] for n in names]
        reduced = runtime.sum(torch.tensor(flat, dtype=torch.float64)).tolist()
        half = len(names)
        means = {n: reduced[i] / reduced[half + i] if reduced[half + i] else math.nan for i, n in enumerate(names)}
        return means | extremes

    def _extremes(self, runtime: Processes) -> dict[str, float]:
        names = sorted(self.extremes)
        if not names:
            return {}
        found = runtime.maximum(torch.tensor([self.extremes[n][1] for n in names], dtype=torch.float64)).tolist()
        return {n: math.nan if v == -math.inf else self.extremes[n][0] * v for n, v in zip(names, found, strict=True)}


def backprop(context: StepContext, micros: list[Batch]) -> StepResult:
    """Update theta <- optimizer(gradient of sum(loss + auxiliary) / sum(weight) + penalty).

    One denominator for the whole step: it is counted over all micro-batches and ranks before the first forward pass.
    Data-parallel wrappers average gradients over ranks, hence the factor `world`. What depends on weights alone is computed
    once for all micro-batches (see `shared_weights`).
    """
    weight = max(context.weight(micros), 1e-12)
    sums = MetricSums()
    total = torch.zeros((), dtype=torch.float64)
    passes = context.runtime.passes(len(micros))
    with shared_weights(context.model, passes) as finish_micro:
        for index in range(passes):
            # Where every process has to make the same passes, one with fewer micro-batches repeats its last one for nothing.
            counts, last = index < len(micros), index == passes - 1
            micro = micros[min(index, len(micros) - 1)]
            with context.runtime.sync(context.roles.prepared, last):
                loss = context.objective.training_loss(micro, context.roles)
                value = (loss.total + loss.auxiliary) * (context.runtime.world / weight if counts else 0.0)
                if last:
                    value = value + context.stack.penalty(context.model)
                value.backward()
                finish_micro()
            if counts:
                total += loss.total.detach().double().cpu()
                sums.add(loss.metrics)
    mean = float(context.runtime.sum(total.reshape(1))) / weight
    norm = context.clip()
    metrics = sums.mean(context.runtime)
    if not (_finite(mean) and _finite(norm)):
        context.optimizer.zero_grad(set_to_none=True)
        return StepResult(mean, norm, metrics, finite=False)
    context.stack.after_backward(context.model, context.step)
    with context.stack.stepping(context.model, context.optimizer):
        context.optimizer.step()
    return StepResult(mean, norm, metrics)


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
