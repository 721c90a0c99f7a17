"""The rules that merge changes, worked by hand in float64 and against peft's own functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmrecipe.core import registry
from llmrecipe.interop.task_vectors import agreeing_mean, drop_and_rescale, trim_entries

FIRST = torch.tensor([4.0, -3.0, 0.5, 1.0], dtype=torch.float64)
SECOND = torch.tensor([-1.0, -5.0, 2.0, 0.25], dtype=torch.float64)
THIRD = torch.tensor([-2.0, 6.0, 1.0, -8.0], dtype=torch.float64)
WEIGHTS = [1.0, 0.5, 2.0]


def merge(
    tensors: list[Tensor], weights: list[float], name: str, generator: torch.Generator | None = None, **options: Any
) -> Tensor:
    return registry.load_class("merge_method", name)(**options).merge(tensors, weights, generator or torch.Generator())


def near(got: Tensor, wanted: list[float]) -> None:
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), atol=1e-15, rtol=0)


def test_trim_keeps_the_largest_share_and_the_first_of_equals() -> None:
    near(trim_entries(FIRST, 0.5), [4, -3, 0, 0])
    near(trim_entries(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64), 0.7), [1, -1, 0])
    near(trim_entries(FIRST, 1.0), FIRST.tolist())
    assert not trim_entries(FIRST, 0.2).any()  # floor(0.2 * 4) = 0 entries


def test_ties_by_hand() -> None:
    """Trimmed to half: [4, -3, 0, 0], [0, -5, 2, 0], [0, 6, 0, -8].

    Sums 4, -2, 2, -8 elect + - + -. Weighted and averaged over the agreeing: 4; (-3 - 2.5) / 2; 0.5 * 2; 2 * -8.
    """
    near(merge([FIRST, SECOND, THIRD], WEIGHTS, "ties", density=0.5), [4, -2.75, 1, -16])


def test_signs_elected_by_number_and_the_tie() -> None:
    """Untrimmed first entries 4, -1, -2: the sum is +1, but two of three are negative: (-1 * 0.5 - 2 * 2) / 2 = -2.25."""
    one = [t[:1] for t in (FIRST, SECOND, THIRD)]
    near(agreeing_mean(one, WEIGHTS, "total"), [4])
    near(agreeing_mean(one, WEIGHTS, "frequency"), [-2.25])
    opposite = [torch.tensor([3.0, 0.0], dtype=torch.float64), torch.tensor([-3.0, 0.0], dtype=torch.float64)]
    near(agreeing_mean(opposite, [1.0, 1.0]), [3, 0])


def test_pruning_and_sums_by_hand() -> None:
    near(merge([FIRST, SECOND], [1.0, 0.5], "magnitude_prune", density=0.5), [4, -5.5, 1, 0])
    near(merge([FIRST, SECOND], [1.0, -0.5], "linear"), [4.5, -0.5, -0.5, 0.875])


def test_dare_keeps_the_expectation_and_rescales_what_it_keeps() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([drop_and_rescale(FIRST, 0.25, generator) for _ in range(4000)])
    assert set(drawn[:, 0].tolist()) == {0.0, 16.0}
    # Standard error of the first entry: 4 sqrt(3 / 4000) = 0.11.
    assert ((drawn.mean(0) - FIRST) / FIRST).abs().max() < 0.1
    assert torch.equal(drop_and_rescale(FIRST, 1.0), FIRST)
    both = merge([FIRST, SECOND], [1.0, 0.5], "dare_linear", torch.Generator().manual_seed(1), density=0.5)
    draws = torch.Generator().manual_seed(1)
    masks = [torch.bernoulli(torch.full((4,), 0.5, dtype=torch.float64), generator=draws) for _ in range(2)]
    near(both, (FIRST * masks[0] * 2 + 0.5 * SECOND * masks[1] * 2).tolist())


@pytest.mark.parametrize("rule", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_equal_to_peft(rule: str, sign: str) -> None:
    from peft.utils import merge_utils

    generator = torch.Generator().manual_seed(5)
    tensors = [torch.randn(6, 7, generator=generator, dtype=torch.float64) for _ in range(3)]
    extra = {"majority_sign_method": sign} if "ties" in rule else {}
    torch.manual_seed(3)
    wanted = getattr(merge_utils, rule)(tensors, torch.tensor(WEIGHTS, dtype=torch.float64), 0.3, **extra)
    elected = {"sign": sign} if "ties" in rule else {}
    got = merge(tensors, WEIGHTS, rule, torch.Generator().manual_seed(3), density=0.3, **elected)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)
