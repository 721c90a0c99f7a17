"""What is measured of vectors: whether the right text is found, how the vectors lie, whether they agree with people.

Letters: A anchors, M candidates, N vectors, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 512
"""Rows of a table of pairs that are in memory at once."""
RECALLS = (1, 5, 10)


def ranks(closeness: Tensor, own: Tensor, barred: Tensor) -> Tensor:
    """Return the rank (A,) of the right candidate, 1 is the best; one that is as close counts as closer.

    Args:
        closeness: (A, M), larger is nearer.
    """
    right = closeness.gather(1, own.unsqueeze(1))
    before = (closeness >= right) & ~barred
    return before.scatter(1, own.unsqueeze(1), True).sum(1)


def retrieval(found: Tensor) -> dict[str, float]:
    """Return recall@k, the share of ranks (A,) up to k, and the mean reciprocal rank."""
    shares = {f"recall@{k}": float((found <= k).double().mean()) for k in RECALLS}
    return {**shares, "mrr": float((1.0 / found.double()).mean())}


def alignment(x: Tensor, y: Tensor) -> Tensor:
    """Return the squared distance (A,) of matching vectors on the unit sphere, (A, D) each (arXiv 2005.10242)."""
    return ((F.normalize(x, dim=-1) - F.normalize(y, dim=-1)) ** 2).sum(-1)


def uniformity(z: Tensor) -> float:
    """Return log E exp(-2 |z_i - z_j|^2) over the pairs of N vectors on the unit sphere (arXiv 2005.10242); 0: collapse."""
    z = F.normalize(z, dim=-1)
    total = 0.0
    for block in z.split(BLOCK):
        total += float(torch.exp(-2.0 * torch.cdist(block, z) ** 2).sum())
    pairs = len(z) * (len(z) - 1)
    return math.log((total - len(z)) / pairs) if pairs else 0.0


def effective_rank(z: Tensor) -> float:
    """Return exp(entropy of the normalised singular values) of N centred vectors, (N, D): 1 where one direction is all.

    Source: Roy and Vetterli, The effective rank (EUSIPCO 2007).
    """
    values = torch.linalg.svdvals(z - z.mean(0))
    if not float(values.sum()):
        return 0.0
    p = values / values.sum()
    return math.exp(-float(torch.special.xlogy(p, p).sum()))
