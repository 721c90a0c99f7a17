"""Which rows a batch has: of one size, or of sizes that grow."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from pydantic import ValidationError

from llmrecipe.data.batch_plan import BatchPlan
from llmrecipe.recipe.schema import BatchSection, BatchWarmupSection


def plan(rows: int, size: int, start: int | None = None, batches: int = 1, increment: int = 1) -> BatchPlan:
    warm = None if start is None else BatchWarmupSection(start=start, batches=batches, increment=increment)
    return BatchPlan.of(BatchSection(size=size, warmup=warm), rows)


def test_a_warm_up_by_hand() -> None:
    # From 2 to 8 rows by 2 over six batches: 2 2 4 4 6 6, then 8. Epochs have 21 rows, so the sixth batch has the last 3.
    made = plan(21, 8, start=2, batches=6, increment=2)
    assert [made.size_of(k) for k in range(8)] == [2, 2, 4, 4, 6, 6, 8, 8]
    first = [(0, 0, 2), (0, 2, 4), (0, 4, 8), (0, 8, 12), (0, 12, 18), (0, 18, 21)]
    assert list(made.spans(10)) == [*first, (1, 0, 8), (1, 8, 16), (1, 16, 21), (2, 0, 8)]
    assert [made.batches(passes) for passes in (0.5, 1, 1.5, 2, 3)] == [3, 6, 8, 9, 12]
    assert made.saved(3) == 6 + 6 + 4 and made.saved(50) == 6 + 6 + 4 + 4 + 2 + 2
    assert made.fewest() == 2


def test_without_a_warm_up_batches_are_cut_from_each_epoch() -> None:
    made = plan(10, 4)
    assert list(made.spans(5)) == [(0, 0, 4), (0, 4, 8), (0, 8, 10), (1, 0, 4), (1, 4, 8)]
    assert [made.batches(passes) for passes in (0.1, 1, 1.5, 2)] == [1, 3, 5, 6] and made.saved(9) == 0
    assert plan(9, 4).fewest() == 1 and plan(8, 4).fewest() == 4 and plan(3, 8).fewest() == 3


@pytest.mark.parametrize("seed", range(30))
def test_every_row_of_every_epoch_once(seed: int) -> None:
    draw = random.Random(seed)
    rows, increment, start = draw.randint(1, 60), draw.randint(1, 3), draw.randint(1, 5)
    size = start + increment * draw.randint(1, 6)
    made = plan(rows, size, start, draw.randint(1, 30), increment)
    spans = list(made.spans(200))
    for (epoch, first, end), after in itertools.pairwise(spans):
        assert 0 <= first < end <= rows
        assert after[:2] == ((epoch, end) if end < rows else (epoch + 1, 0))
    full = [end - first for k, (_, first, end) in enumerate(spans) if end < rows and end - first == made.size_of(k)]
    assert all(end == rows or end - first == made.size_of(k) for k, (_, first, end) in enumerate(spans))
    assert full == sorted(full), "batches only grow"
    for passes in (1, 2, 3):
        assert spans[made.batches(passes)][:2] == (passes, 0)
    assert made.fewest() == min(end - first for _, first, end in spans[: made.batches(spans[150][0])])


def test_a_warm_up_has_as_many_sizes_as_fit() -> None:
    # More sizes than batches: some are left out, and the last batch of the warm-up is below the full size.
    made = plan(1000, 64, start=4, batches=5, increment=4)
    assert [made.size_of(k) for k in range(6)] == [4 + 4 * math.floor(k * 15 / 5) for k in range(5)] + [64]


@pytest.mark.parametrize(
    ("start", "increment", "says"),
    [(8, 1, r"warmup\.start \(8\) below size \(8\)"), (3, 2, r"warmup\.increment \(2\) that divides size - start \(5\)")],
)
def test_warm_ups_that_never_reach_the_size_are_refused(start: int, increment: int, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        BatchSection(size=8, warmup=BatchWarmupSection(start=start, batches=4, increment=increment))
