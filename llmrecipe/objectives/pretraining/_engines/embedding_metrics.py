"""What is measured of vectors: whether the right text is found, how the vectors lie, whether they cluster by label.

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


def v_measure(z: Tensor, labels: Tensor) -> float:
    """Return how well k-means finds the classes of N vectors, (N, D), k the number of classes in labels (N,).

    V = 2 h c / (h + c): homogeneity h is 1 where a cluster holds one class, completeness c where a class is in one cluster;
    both are near 0 by chance. Of 10 starts the tightest clusters count; the starts are the same in every evaluation.

    Source: Rosenberg and Hirschberg, V-Measure (EMNLP 2007).
    """
    from sklearn.cluster import KMeans  # noqa: PLC0415 (a second that only an evaluation needs)
    from sklearn.metrics import v_measure_score  # noqa: PLC0415

    classes = labels.numpy()
    found = KMeans(len(set(classes.tolist())), n_init=10, random_state=0).fit_predict(z.numpy())
    return float(v_measure_score(classes, found))
