"""What contrastive losses compute from vectors: distances, triplets, InfoNCE, mined negatives.

Letters: A anchors, M candidates, D width. `own` (A,) is the column of each anchor's positive among the candidates; `barred`
(A, M) are the candidates that are no negatives of an anchor, its positive not included.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipe.engine.logprob import upcast


def distances(x: Tensor, y: Tensor, kind: str) -> Tensor:
    """Return the distance of every row of x (A, D) from its row of y (A, D), (A,).

    `euclidean` is torch's `pairwise_distance`, which has a gradient where the rows are equal.
    """
    if kind == "cosine":
        return 1.0 - F.cosine_similarity(x, y)
    return F.pairwise_distance(x, y) if kind == "euclidean" else ((x - y) ** 2).sum(-1)


def distance_table(x: Tensor, y: Tensor, kind: str) -> Tensor:
    """Return the distance of every row of x (A, D) from every row of y (M, D), (A, M)."""
    if kind == "cosine":
        return 1.0 - F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T
    found = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return found if kind == "euclidean" else found**2


def triplet(positive: Tensor, negative: Tensor, margin: float) -> Tensor:
    """Compute max(0, d(z, z+) - d(z, z-) + margin) from both distances, (A,) each."""
    return F.relu(positive - negative + margin)


def mined_triplet(table: Tensor, own: Tensor, barred: Tensor, margin: float, mining: str) -> Tensor:
    """Compute the triplet loss (A,) of each anchor with negatives found among all candidates.

    `all` is the mean over every negative; `hard` takes the nearest; `semi_hard` the nearest of those that are farther away than
    the positive, or the farthest of all where none is. An anchor without a negative has no loss.

    Args:
        table: distances (A, M).
    """
    rows = torch.arange(len(own), device=own.device)
    positive = table[rows, own]
    usable = ~barred
    usable[rows, own] = False
    if mining == "all":
        losses = triplet(positive.unsqueeze(1), table, margin) * usable
        return losses.sum(1) / usable.sum(1).clamp(min=1)
    found = usable
    if mining == "semi_hard":
        farther = usable & (table > positive.unsqueeze(1))
        farthest = table.masked_fill(~usable, -math.inf).argmax(1)
        alone = F.one_hot(farthest, table.shape[1]).bool() & usable
        found = torch.where(farther.any(1, keepdim=True), farther, alone)
    nearest = table.masked_fill(~found, math.inf).argmin(1)
    return triplet(positive, table[rows, nearest], margin) * usable.any(1)


def infonce(logits: Tensor, own: Tensor, barred: Tensor) -> Tensor:
    """Compute -log softmax(logits)[own] of each anchor, (A,), over its candidates without the barred ones; logits (A, M)."""
    return F.cross_entropy(upcast(logits).masked_fill(barred, -math.inf), own, reduction="none")


def barred_candidates(anchor_keys: Tensor, positive_keys: Tensor, keys: Tensor, own: Tensor) -> Tensor:
    """Return which candidates (A, M) are the anchor's or its positive's text once more: no negatives.

    Args:
        anchor_keys: (A,) digests of the texts; positive_keys: (A,); keys: (M,) of the candidates.
    """
    barred = (keys == anchor_keys.unsqueeze(1)) | (keys == positive_keys.unsqueeze(1))
    return barred.scatter(1, own.unsqueeze(1), False)
