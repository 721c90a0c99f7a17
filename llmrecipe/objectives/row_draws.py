"""Random numbers that belong to a row: the same whatever the batch, the number of processes, and where a run was resumed."""

from __future__ import annotations

import numpy as np


def generator(seed: int, epoch: int | None, row: int, number: int = 0) -> np.random.Generator:
    """Return the random numbers of a row's sequence; an epoch of None is evaluation, where they never change."""
    return np.random.default_rng([seed, 0 if epoch is None else 1 + epoch, row, number])
