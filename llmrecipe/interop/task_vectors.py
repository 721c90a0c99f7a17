"""Merging what several runs changed: each function takes n tensors of one shape and n weights, and returns their merger.

task_arithmetic   sum_i w_i t_i
magnitude_prune   sum_i w_i top(t_i): the `density` share of each t_i with the largest magnitudes, the rest zero
dare              sum_i w_i m_i t_i / density with m_i ~ Bernoulli(density) per entry: unbiased (arXiv 2311.03099)
ties              trim each t_i, elect the sign of every entry, average w_i t_i over those that agree (arXiv 2306.01708)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Sign = Literal["total", "frequency"]


def task_arithmetic(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return sum_i w_i t_i."""
    return _weighted(tensors, weights).sum(0)


def trim_entries(tensor: Tensor, density: float) -> Tensor:
    """Keep the floor(density * size) entries of largest magnitude, of equal ones the first; the rest is zero."""
    flat = tensor.flatten()
    kept = flat.abs().sort(descending=True, stable=True).indices[: int(density * flat.numel())]
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(tensor)


def drop_and_rescale(tensor: Tensor, density: float, generator: torch.Generator | None = None) -> Tensor:
    """Return m t / density with every m ~ Bernoulli(density): the expectation is t."""
    if density >= 1.0:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density


def agreeing_mean(tensors: Sequence[Tensor], weights: Sequence[float], sign: Sign = "total") -> Tensor:
    """Return the mean of w_i t_i over the tensors whose sign is the elected one; zero where none has it.

    Args:
        sign: `total` elects the sign of sum_i t_i, `frequency` that of sum_i sgn(t_i); a tie elects plus.
    """
    stacked = torch.stack(list(tensors))
    votes = stacked.sum(0) if sign == "total" else stacked.sign().sum(0)
    elected = torch.where(votes >= 0, 1.0, -1.0).to(stacked.dtype)
    agrees = stacked.sign() == elected
    return (_weighted(tensors, weights) * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def magnitude_prune(tensors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Sum the trimmed tensors: sum_i w_i top(t_i)."""
    return task_arithmetic([trim_entries(t, density) for t in tensors], weights)


def ties(tensors: Sequence[Tensor], weights: Sequence[float], density: float, sign: Sign = "total") -> Tensor:
    """Trim each tensor, elect the sign of every entry, average over those that agree."""
    return agreeing_mean([trim_entries(t, density) for t in tensors], weights, sign)


def dare_linear(
    tensors: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator | None = None
) -> Tensor:
    """Drop entries at random, rescale the rest, and sum: sum_i w_i m_i t_i / density."""
    return task_arithmetic([drop_and_rescale(t, density, generator) for t in tensors], weights)


def dare_ties(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    density: float,
    sign: Sign = "total",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drop entries at random, rescale the rest, and average over those that have the elected sign."""
    return agreeing_mean([drop_and_rescale(t, density, generator) for t in tensors], weights, sign)


def _weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    stacked = torch.stack(list(tensors))
    return stacked * torch.tensor(list(weights), dtype=stacked.dtype).view(-1, *[1] * (stacked.dim() - 1))
