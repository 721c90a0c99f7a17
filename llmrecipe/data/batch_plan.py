"""Which rows of which epoch each batch of a run has: of one size, or of sizes that grow (`batch.warmup`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmrecipe.recipe.schema import BatchSection, BatchWarmupSection


@dataclass(frozen=True)
class BatchPlan:
    """The rows of each batch, a pure function of its number: no process, accumulation or resume can change them.

    Without a warm-up every batch has `size` rows, and the last one of an epoch those that are left. With one, batch k (from 0)
    out of the first w has start + increment * floor(k (size - start) / (increment w)) rows; no batch reaches over the end of an
    epoch.
    """

    rows: int
    """Rows of an epoch."""
    size: int
    """Rows of a batch once it has grown."""
    warmup: BatchWarmupSection | None = None

    @classmethod
    def of(cls, batch: BatchSection, rows: int) -> BatchPlan:
        """Return the plan of a recipe's `batch` section over that many rows."""
        return cls(rows, batch.size, batch.warmup)

    def size_of(self, batch: int) -> int:
        """Return the most rows that batch number `batch` may have; the end of an epoch may leave fewer."""
        warm = self.warmup
        if warm is None or batch >= warm.batches:
            return self.size
        levels = (self.size - warm.start) // warm.increment
        return warm.start + warm.increment * (batch * levels // warm.batches)

    @cached_property
    def _growing(self) -> list[tuple[int, int]]:
        """(epoch, first row) of each batch of the warm-up, and of the one after it."""
        places, epoch, first = [(0, 0)], 0, 0
        for batch in range(self.warmup.batches if self.warmup is not None else 0):
            first += self.size_of(batch)
            if first >= self.rows:
                epoch, first = epoch + 1, 0
            places.append((epoch, first))
        return places

    def place(self, batch: int) -> tuple[int, int, int]:
        """Return (epoch, first row, row after the last) of a batch; rows are counted in the order of the epoch."""
        grown = len(self._growing) - 1
        if batch < grown:
            epoch, first = self._growing[batch]
        else:
            epoch, first = self._growing[-1]
            rest = batch - grown
            # What the warm-up left of its last epoch comes first, then whole epochs.
            left = max(1, math.ceil((self.rows - first) / self.size))
            if rest < left:
                first += rest * self.size
            else:
                more, at = divmod(rest - left, max(1, math.ceil(self.rows / self.size)))
                epoch, first = epoch + 1 + more, at * self.size
        return epoch, first, max(first, min(self.rows, first + self.size_of(batch)))

    def batches(self, passes: float) -> int:
        """Return the number of batches of some passes over the rows, at least 1."""
        plain = math.ceil(self.rows / self.size)
        if self.warmup is None:
            return max(1, math.ceil(passes * plain))
        whole, part = int(passes), passes % 1.0
        ends = [self._first_of(whole), self._first_of(whole + 1)]
        return max(1, ends[0] + math.ceil(part * (ends[1] - ends[0])))

    def _first_of(self, epoch: int) -> int:
        """Return the number of the first batch of an epoch."""
        inside = next((i for i, (at, _) in enumerate(self._growing) if at >= epoch), None)
        if inside is not None:
            return inside
        last, first = self._growing[-1]
        left = max(1, math.ceil((self.rows - first) / self.size))
        return len(self._growing) - 1 + left + (epoch - last - 1) * max(1, math.ceil(self.rows / self.size))

    def spans(self, batches: int) -> Iterator[tuple[int, int, int]]:
        """Yield the places of the first batches of a run."""
        return (self.place(batch) for batch in range(batches))

    def fewest(self) -> int:
        """Return the rows of the smallest batch: of the warm-up, the rest of its last epoch, or any epoch after it."""
        grown = [end - first for _, first, end in self.spans(len(self._growing) - 1)]
        rests = [(self.rows - first) % self.size or min(self.size, self.rows - first) for first in (self._growing[-1][1], 0)]
        return min(*grown, *rests)

    def saved(self, batches: int) -> int:
        """Return how many rows the first batches have less than they would have without a warm-up."""
        return sum(self.size - self.size_of(batch) for batch in range(min(batches, len(self._growing) - 1)))
