"""Correlations of two lists of numbers, in float64."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def correlation(x: Tensor, y: Tensor) -> float:
    """Return Pearson's r of x and y, (N,) each; 0 where one of them is constant or there are fewer than two."""
    return _pearson(_values(x), _values(y))


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Return Spearman's rho of x and y, (N,) each: Pearson's r of their ranks; 0 where one of them is constant."""
    return _pearson(mean_ranks(_values(x)), mean_ranks(_values(y)))


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value from 1, (N,); equal values have the mean of the ranks they take up.

    Examples:
        >>> mean_ranks(np.array([5.0, 1.0, 5.0, 9.0])).tolist()
        [2.5, 1.0, 2.5, 4.0]
    """
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2.0)[which]
    return ranks


def _values(x: Tensor) -> np.ndarray:
    found: np.ndarray = x.detach().double().cpu().numpy()
    return found


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    a, b = x - x.mean(), y - y.mean()
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
