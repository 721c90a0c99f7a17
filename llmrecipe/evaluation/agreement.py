"""Agreement of two labellers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Agreement:
    """Agreement on the items that both have labelled."""

    items: int
    share: float
    """Share of equal labels."""
    kappa: float | None
    """Cohen's; None where chance alone would make them agree always (both gave one and the same label throughout)."""


def agreement(one: Mapping[K, Hashable], other: Mapping[K, Hashable]) -> Agreement | None:
    """Compute the share of equal labels, and Cohen's kappa = (p_o - p_e) / (1 - p_e), over the items that are in both.

    p_o is that share, p_e = sum over labels c of p_one(c) p_other(c), what two who label by chance with these frequencies
    would reach. None where no item is in both.

    Source: J. Cohen, A Coefficient of Agreement for Nominal Scales, Educational and Psychological Measurement 20 (1960).
    """
    items = [key for key in one if key in other]
    if not items:
        return None
    count = len(items)
    share = sum(one[key] == other[key] for key in items) / count
    mine, theirs = (Counter(side[key] for key in items) for side in (one, other))
    chance = sum(mine[label] * theirs[label] for label in mine) / count**2
    return Agreement(count, share, None if chance == 1.0 else (share - chance) / (1.0 - chance))
