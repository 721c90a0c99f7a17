"""Rows that two splits share: a validation split that repeats training rows measures memory, not learning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llmrecipe.data.cache import TokenTable
    from llmrecipe.data.prepare import TokenData

FACTOR = np.uint64(0x9E3779B97F4A7C15)


def shared_rows(first: TokenData, second: TokenData) -> int:
    """Count the rows of the second split whose tokens are those of a row of the first."""
    known = np.unique(np.concatenate([_hashes(table) for table in first.tables]))
    return sum(int(np.isin(_hashes(table), known).sum()) for table in second.tables)


def _hashes(table: TokenTable) -> np.ndarray:
    """Return one number per row, (rows,), that depends on all of its token ids and their places.

    Tokens of a row are mixed with their place by the finalizer of MurmurHash3 (public domain) and summed modulo 2^64.
    """
    names = [name for name in table.kind.lists if name not in table.kind.uncounted]
    parts = []
    for batch in table.batches:
        total = np.zeros(batch.rows, dtype=np.uint64)
        for number, name in enumerate(names):
            offsets, values, _ = batch.lists[name]
            lengths = np.diff(offsets)
            values = values[offsets[0] : offsets[-1]]
            place = np.arange(len(values)) - np.repeat(offsets[:-1] - offsets[0], lengths)
            mixed = _mix(values.astype(np.uint64) + _mix((place + 1).astype(np.uint64) * np.uint64(2 * number + 1) * FACTOR))
            sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(mixed, dtype=np.uint64)])
            total += _mix(sums[offsets[1:] - offsets[0]] - sums[offsets[:-1] - offsets[0]] + np.uint64(number))
        parts.append(total)
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    mixed: np.ndarray = values ^ (values >> np.uint64(33))
    return mixed
