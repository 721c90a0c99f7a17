"""Soft top-k: the closed form against bisection, its gradient, its limits; how far the iteration gets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmrecipe.methods.additive._engines.soft_topk import iterated_top_k, soft_top_k


def bisected(scores: Tensor, k: int, eps: float) -> Tensor:
    """min(1, exp((s + a) / e)) with a found by halving an interval."""
    low, high = -50.0, 50.0
    for _ in range(200):
        a = (low + high) / 2
        low, high = (low, a) if float(((scores + a) / eps).clamp(max=0).exp().sum()) > k else (a, high)
    return ((scores + a) / eps).clamp(max=0).exp()


def everywhere(scores: Tensor) -> Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


@pytest.mark.parity("coda", "soft top-k by bisection, float64")
@pytest.mark.parametrize("eps", [0.03, 0.3, 1.0])
@pytest.mark.parametrize("k", [1, 2, 17, 63])
def test_the_closed_form_equals_bisection(eps: float, k: int) -> None:
    scores = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    found = soft_top_k(scores, torch.full((4,), k), everywhere(scores), eps)
    for row in range(4):
        torch.testing.assert_close(found[row], bisected(scores[row], k, eps), atol=1e-10, rtol=0)
    torch.testing.assert_close(found.sum(1), torch.full((4,), float(k), dtype=torch.float64))


def test_limits_one_is_a_softmax_and_all_is_ones() -> None:
    scores = torch.randn(2, 9, dtype=torch.float64)
    one = soft_top_k(scores, torch.tensor([1, 1]), everywhere(scores), 0.5)
    torch.testing.assert_close(one, (scores / 0.5).softmax(1))
    assert torch.equal(soft_top_k(scores, torch.tensor([9, 12]), everywhere(scores), 0.5), torch.ones_like(scores))


def test_groups_of_several_lengths_are_solved_as_if_alone() -> None:
    scores = torch.randn(3, 12, dtype=torch.float64)
    sizes, k = [12, 5, 1], torch.tensor([4, 3, 1])
    exists = torch.arange(12) < torch.tensor(sizes)[:, None]
    for solve in (soft_top_k, iterated_top_k):
        together = solve(scores, k, exists, 0.2)
        for row, size in enumerate(sizes):
            part = scores[row : row + 1, :size]
            torch.testing.assert_close(together[row, :size], solve(part, k[row : row + 1], everywhere(part), 0.2)[0])
            assert not together[row, size:].any()


def test_the_gradient_passes_gradcheck_and_is_zero_where_saturated() -> None:
    scores = torch.tensor([[3.0, 0.2, 0.1, -0.3, -0.5], [0.0, 0.4, 9.0, 9.0, 9.0]], dtype=torch.float64, requires_grad=True)
    exists = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    k = torch.tensor([2, 1])
    assert torch.autograd.gradcheck(lambda s: soft_top_k(s, k, exists, 0.3), (scores,))
    weights = soft_top_k(scores, k, exists, 0.3)
    (weights * torch.randn(2, 5, dtype=torch.float64)).sum().backward()
    assert float(weights[0, 0]) == 1.0
    assert scores.grad is not None and scores.grad[0, 0] == 0.0
    assert not scores.grad[1, 2:].any()
    assert bool(scores.grad[0, 1:].any())


def test_twenty_steps_fall_short_of_k_and_many_reach_it() -> None:
    """At e = 0.03 the paper's twenty steps with a falling e leave about a fifth of the mass out; without it almost all."""
    scores = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    k = torch.full((8,), 128)
    assert 90 < float(iterated_top_k(scores, k, everywhere(scores), 0.03).sum(1).mean()) < 110
    assert float(iterated_top_k(scores, k, everywhere(scores), 0.03, start=0.03).sum(1).mean()) < 60
    done = iterated_top_k(scores, k, everywhere(scores), 0.3, steps=400)
    torch.testing.assert_close(done, soft_top_k(scores, k, everywhere(scores), 0.3), atol=2e-3, rtol=0)
