"""How one update is made. Back-propagation is the default rule; a wrapper may bring another (MeZO)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llmrecipe.data.collate import Batch
from llmrecipe.data.transfer import Arriving
from llmrecipe.methods._base.late_values import LateMetrics, MetricSums, exact_number
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
    clip: Callable[[], Tensor | float]
    """Clips the gradient norm over everything that trains; returns the norm before clipping."""
    late: bool = False
    """Whether the update may be made before it is known whether loss and gradients are finite: a later reading ends the run."""


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

    def __call__(self, context: StepContext, micros: list[Batch]) -> StepResult | LateResult:
        """Make one update."""


class LateResult:
    """What one optimizer step reports, on its way from the device.

    Args:
        numbers: the means of its metrics, with the summed loss before and the gradient norm behind their numbers.
        weight: the denominator of the loss.
    """

    def __init__(self, numbers: LateMetrics, weight: float):
        self.numbers, self.weight = numbers, weight
        self.arriving: Arriving | None = None
        self.found: StepResult | None = None
        self.more: list[Any] = []
        """Further numbers that `start` was given, read with the others."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Return the metrics, which are read when one of them is looked up."""
        return _ReadAtLookup(self)

    @property
    def finite(self) -> bool:
        """Return whether loss and gradients are finite; wait until it is known."""
        return self.read().finite

    def start(self, more: Sequence[Any] = ()) -> None:
        """Start the copy to the host.

        Args:
            more: further numbers, read in the same copy.
        """
        self.more = list(more)
        self.arriving = Arriving([*self.numbers.numbers, *more])

    def read(self) -> StepResult:
        """Return what the step reports; wait until it is here."""
        if self.found is None:
            if self.arriving is None:
                self.start()
            assert self.arriving is not None, "it has been started"
            read, own = self.arriving.values(), len(self.numbers.numbers)
            loss, norm, self.more = read[0] / self.weight, read[own - 1], read[own:]
            self.found = StepResult(loss, norm, self.numbers.values(read), _finite(loss) and _finite(norm))
        return self.found


class _ReadAtLookup(Mapping[str, float]):
    def __init__(self, result: LateResult):
        self.result = result

    def __getitem__(self, name: str) -> float:
        return self.result.read().metrics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.result.read().metrics)

    def __len__(self) -> int:
        return len(self.result.read().metrics)


def backprop(context: StepContext, micros: list[Batch]) -> StepResult | LateResult:
    """Update theta <- optimizer(gradient of sum(loss + auxiliary) / sum(weight) + penalty).

    One denominator for the whole step: it is counted over all micro-batches and ranks before the first forward pass.
    Data-parallel wrappers average gradients over ranks, hence the factor `world`. What depends on weights alone is computed
    once for all micro-batches (see `shared_weights`). Loss, norm and metrics stay on the device and are read in one copy:
    before the update, which is not made where they are not finite, or where `context.late` after it.
    """
    weight = max(context.weight(micros), 1e-12)
    sums = MetricSums()
    total: Any = 0.0
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
                total = total + exact_number(loss.total)
                sums.add(loss.metrics)
    result = LateResult(sums.late(context.runtime, [total], [context.clip()]), weight)
    if not context.late and not result.read().finite:
        context.optimizer.zero_grad(set_to_none=True)
        return result.read()
    context.stack.after_backward(context.model, context.step)
    with context.stack.stepping(context.model, context.optimizer):
        context.optimizer.step()
    return result if context.late else result.read()


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
