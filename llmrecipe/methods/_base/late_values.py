"""Numbers of a step that stay on the device until they are read: sums of metrics, and what becomes of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeGuard

import torch

from llmrecipe.data.transfer import Arriving, exact_float, to_device

if TYPE_CHECKING:
    from torch import Tensor

Number = torch.Tensor | float
"""A number of the host, or a tensor with one entry."""


class Reductions(Protocol):
    """What reduces numbers over the processes of a run."""

    world: int

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""

    def maximum(self, tensor: Tensor) -> Tensor:
        """Return the elementwise maximum of a tensor over all processes."""


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

    Of a metric that is given as `Largest` or `Smallest` that value is kept; nan where no process has one. What a device has
    computed stays there until it is read.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Any] = defaultdict(float)
        self.counts: dict[str, Any] = defaultdict(float)
        self.extremes: dict[str, tuple[float, Any]] = {}
        """Name -> (sign, the largest of sign * value): the smallest value is the largest of the negated ones."""

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """Add one micro-batch."""
        for name, entry in metrics.items():
            value, count = entry
            if isinstance(entry, Largest | Smallest):
                sign = 1.0 if isinstance(entry, Largest) else -1.0
                known = self.extremes.get(name, (sign, -math.inf))[1]
                self.extremes[name] = (sign, _larger(known, sign * exact_number(value)) if count else known)
                continue
            self.sums[name] = self.sums[name] + exact_number(value)
            self.counts[name] = self.counts[name] + exact_number(count)

    def mean(self, runtime: Reductions) -> dict[str, float]:
        """Return means over all ranks; every rank must have seen the same names."""
        return self.late(runtime).values()

    def late(self, runtime: Reductions, first: Sequence[Number] = (), last: Sequence[Number] = ()) -> LateMetrics:
        """Return the means over all ranks, read when they are needed.

        Args:
            first: sums over micro-batches, to be added up over ranks and read with the means.
            last: numbers that every rank has, to be read with the means.
        """
        names, extremes = sorted(self.sums), sorted(self.extremes)
        flat = [*first, *(self.sums[n] for n in names), *(self.counts[n] for n in names)]
        most = [self.extremes[n][1] for n in extremes]
        if runtime.world > 1:
            flat, most = _over_ranks(runtime.sum, flat), _over_ranks(runtime.maximum, most)
        signs = [self.extremes[n][0] for n in extremes]
        return LateMetrics([*flat, *most, *last], len(first), names, list(zip(extremes, signs, strict=True)))


class LateMetrics:
    """Means whose sums are on their way from the device, in one copy."""

    def __init__(self, numbers: list[Number], first: int, names: list[str], extremes: list[tuple[str, float]]):
        self.numbers = numbers
        self.first, self.names, self.extremes = first, names, extremes

    def values(self, read: Sequence[float] | None = None) -> dict[str, float]:
        """Return the means by name.

        Args:
            read: the numbers, where they have been read already; default: reads them.
        """
        read = Arriving(self.numbers).values() if read is None else read
        half, start = len(self.names), self.first
        sums, counts = read[start : start + half], read[start + half : start + 2 * half]
        means = {n: s / c if c else math.nan for n, s, c in zip(self.names, sums, counts, strict=True)}
        found = read[start + 2 * half : start + 2 * half + len(self.extremes)]
        return means | {n: math.nan if v == -math.inf else sign * v for (n, sign), v in zip(self.extremes, found, strict=True)}


def exact_number(value: Number) -> Number:
    """Return a number as float64, on the device where it is."""
    return value.detach().to(exact_float(value.device)) if isinstance(value, torch.Tensor) else float(value)


def _larger(known: Number, own: Number) -> Number:
    """Return the larger of two numbers, on the device if the second is there; as by `max`, a NaN is never the larger one."""
    if isinstance(own, torch.Tensor):
        return own.fmax(known if isinstance(known, torch.Tensor) else torch.full_like(own, known))
    return max(known, own)


def _over_ranks(reduce: Callable[[Tensor], Tensor], numbers: Sequence[Number]) -> list[Number]:
    """Return numbers reduced over ranks in one exchange, on the device if one of them is there."""
    if not numbers:
        return []
    there = [n.device for n in numbers if isinstance(n, torch.Tensor) and n.device.type != "cpu"]
    place = there[0] if there else torch.device("cpu")
    kind = exact_float(place)
    # Numbers of the host travel together: a tensor of the host is one of them.
    known = to_device(torch.tensor([0.0 if _is_away(n) else float(n) for n in numbers], dtype=kind), place)
    parts = [n.to(kind).reshape(()) if _is_away(n) else known[i] for i, n in enumerate(numbers)]
    return list(reduce(torch.stack(parts)).unbind())


def _is_away(number: Number) -> TypeGuard[torch.Tensor]:
    return isinstance(number, torch.Tensor) and number.device.type != "cpu"
