"""Exactly the k largest of the scores of many tensors, without a copy or a sort of them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmrecipe.core.errors import ModelError

Part = tuple[str, Tensor, "Tensor | None"]
"""(tensor name, scores, flat indices the scores belong to; None for all in order)."""


def top_k(parts: Sequence[Part], k: int) -> dict[str, Tensor]:
    """Return exactly the k largest scores of all parts together, as sorted flat indices a tensor.

    Ties are broken by the order of the parts, then by the lowest flat index. The threshold is found by counting the bit
    patterns of the float32 scores in two rounds (high, then low 16 bits), so no copy or sort of all scores is made.

    Raises:
        ModelError: a score is NaN or negative.
    """
    total = sum(values.numel() for _, values, _ in parts)
    k = min(k, total)
    if k == 0:
        return {name: torch.empty(0, dtype=torch.int64) for name, _, _ in parts}
    keys = [(name, pattern(values), idx) for name, values, idx in parts]
    threshold, ties = cut([key for _, key, _ in keys], k)
    found: dict[str, Tensor] = {}
    for name, key, idx in keys:
        keep = key > threshold
        if ties:
            equal = (key == threshold).nonzero().squeeze(1)
            if idx is not None:
                equal = equal[idx.to(equal.device)[equal].argsort()]
            equal = equal[:ties]
            keep[equal] = True
            ties -= equal.numel()
        where = keep.nonzero().squeeze(1)
        found[name] = (where if idx is None else idx.to(where.device)[where]).sort()[0]
    return found


def cut(keys: Sequence[Tensor], k: int) -> tuple[int, int]:
    """Return (threshold, ties): the k largest of all keys are those above the threshold and `ties` of those that equal it."""
    high, above = _bin(torch.stack([_histogram(key >> 16) for key in keys]).sum(0), k)
    lows = torch.stack([_histogram(key[(key >> 16) == high] & 0xFFFF) for key in keys]).sum(0)
    low, more = _bin(lows, k - above)
    return (high << 16) | low, k - above - more


def counts_at(keys: Sequence[Tensor], k: int) -> list[int]:
    """Return how many of the k largest each tensor has; ties go to the earlier tensor."""
    if k == 0:
        return [0 for _ in keys]
    threshold, ties = cut(keys, k)
    counts = []
    for key in keys:
        equal = min(ties, int((key == threshold).sum()))
        ties -= equal
        counts.append(int((key > threshold).sum()) + equal)
    return counts


def pattern(values: Tensor) -> Tensor:
    """Return float32 bits of non-negative scores, which order as the scores do."""
    single = values.to(torch.float32)
    if not bool((single >= 0).all()):
        raise ModelError("selection: a score is NaN; the loss or a gradient overflowed while scores were taken")
    # +0.0 gives -0.0 the pattern of zero.
    return (single + 0.0).view(torch.int32)


def _histogram(key: Tensor) -> Tensor:
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for part in key.split(1 << 24):
        counts += torch.bincount(part, minlength=1 << 16).cpu()
    return counts


def _bin(counts: Tensor, k: int) -> tuple[int, int]:
    """Return (the bin the k-th largest falls into, how many are in higher bins)."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return counts.numel() - 1 - place, above
