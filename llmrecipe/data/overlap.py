"""Rows that two splits share: a validation split that repeats training rows measures memory, not learning."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llmrecipe.data.cache import TokenTable
    from llmrecipe.data.token_data import TokenData

HASHES = "hashes.npy"
PART = 1 << 16
"""Hashes that are looked up at once."""
RUN = 13
"""Tokens in a row that two texts hardly share by chance: the n-grams of GPT-3's overlap analysis (arXiv 2005.14165)."""
FACTOR = np.uint64(0x9E3779B97F4A7C15)


def shared_rows(first: TokenData, second: TokenData) -> int:
    """Count the rows of the second split whose tokens (and files) are those of a row of the first.

    Hashes of the first are gone through in parts and kept with its tables, so that a large split is read for them once.
    """
    wanted, counts = np.unique(np.concatenate([row_hashes(table) for table in second.tables]), return_counts=True)
    found = np.zeros(len(wanted), dtype=bool)
    for table in first.tables:
        hashes = row_hashes(table)
        for start in range(0, len(hashes) if len(wanted) else 0, PART):
            part = hashes[start : start + PART]
            places = np.minimum(np.searchsorted(wanted, part), len(wanted) - 1)
            found[places[wanted[places] == part]] = True
    return int(counts[found].sum())


def rows_with_shared_runs(first: TokenData, second: TokenData, length: int = RUN) -> int:
    """Count the rows of the second split that share `length` tokens in a row with a row of the first.

    A row of fewer tokens shares none. The first split may be large and is gone through batch by batch.
    """
    runs, rows, before = [], [], 0
    for table in second.tables:
        for found, owner in _runs(table, length):
            runs.append(found)
            rows.append(owner + before)
        before += len(table)
    wanted, places = np.unique(np.concatenate(runs), return_inverse=True) if runs else (np.zeros(0, dtype=np.uint64), None)
    if places is None or not len(wanted):
        return 0
    shared = np.zeros(len(wanted), dtype=bool)
    for table in first.tables:
        for found, _ in _runs(table, length):
            at = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
            shared[at[wanted[at] == found]] = True
    return len(np.unique(np.concatenate(rows)[shared[places]]))


def _runs(table: TokenTable, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the hash of each `length` tokens in a row of a table's rows, and the row it is from, (runs,) each."""
    start = 0
    for batch in table.batches:
        for name in table.kind.lists:
            if name in table.kind.uncounted or name not in batch.lists:
                continue
            offsets, values, _ = batch.lists[name]
            lengths = np.diff(offsets)
            owner = np.repeat(np.arange(len(lengths)), lengths)
            mixed = _mix(values[offsets[0] : offsets[-1]].astype(np.uint64) + FACTOR)
            count = len(mixed) - length + 1
            if count < 1:
                continue
            total = np.zeros(count, dtype=np.uint64)
            for place in range(length):
                total = total * FACTOR + mixed[place : place + count]
            whole = owner[:count] == owner[length - 1 :]
            yield _mix(total[whole]), owner[:count][whole] + start
        start += batch.rows


def row_hashes(table: TokenTable) -> np.ndarray:
    """Return one number per row, (rows,), from the file next to a table where there is one; it is written otherwise."""
    # Files that rows name may change while the table of tokens stays.
    place = None if table.folder is None or table.features is not None else table.folder / HASHES
    if place is not None:
        with contextlib.suppress(OSError, ValueError):
            kept: np.ndarray = np.load(place, mmap_mode="r")
            if kept.shape == (len(table),) and kept.dtype == np.uint64:
                return kept
    hashes = _hashes(table)
    if place is not None:
        with contextlib.suppress(OSError):  # a cache that cannot be written is only read
            aside = place.with_name(f"{HASHES}.{os.getpid()}")
            with aside.open("wb") as file:
                np.save(file, hashes)
            aside.replace(place)
    return hashes


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
    if table.features is not None and parts:
        digests = [table.features.digest(path) for path in table.column("features")]
        hashes: np.ndarray = np.concatenate(parts) + _mix(np.array(digests, dtype=np.uint64))
        return hashes
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    mixed: np.ndarray = values ^ (values >> np.uint64(33))
    return mixed
