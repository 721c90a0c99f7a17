"""Reference log-probabilities, remembered by row so that each row is scored once.

A cache file is keyed by what the numbers depend on: token rows, reference weights, dtype and engine version. It lies beside
the token cache and is only ever read back under the same key.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from llmrecipe.data.batch import Batch

VERSION = "1"
"""Changes when the log-prob engine changes what it computes."""


class ReferenceCache:
    """Summed log-probabilities of the sequences of a row, float32, by row index."""

    def __init__(self, path: Path | None = None):
        self.path = path
        self.known: dict[int, Tensor] = {}
        self.hits = 0
        self.misses = 0
        if path is not None and path.exists():
            self._read(path)

    def get(self, batch: Batch) -> Tensor | None:
        """(S,) sums in the batch's order, or None when a row is missing."""
        if not batch.rows or any(row not in self.known for row in batch.rows):
            return None
        self.hits += len(batch.rows)
        return torch.cat([self.known[row] for row in batch.rows])

    def put(self, batch: Batch, sums: Tensor) -> None:
        """Remember the sums of a batch whose rows hold equally many sequences each."""
        if not batch.rows:
            return
        self.misses += len(batch.rows)
        for row, values in zip(batch.rows, sums.detach().float().cpu().chunk(len(batch.rows)), strict=True):
            self.known[row] = values.clone()

    def save(self) -> None:
        """Write the cache aside and move it into place."""
        if self.path is None or not self.misses:
            return
        from safetensors.torch import save_file

        self.path.parent.mkdir(parents=True, exist_ok=True)
        index = sorted(self.known)
        tensors = {"rows": torch.tensor(index), "sums": torch.stack([self.known[i] for i in index])}
        aside = self.path.with_suffix(f".{os.getpid()}.tmp")
        save_file(tensors, str(aside))
        os.replace(aside, self.path)

    def _read(self, path: Path) -> None:
        from safetensors.torch import load_file

        tensors = load_file(str(path))
        self.known = {int(row): sums for row, sums in zip(tensors["rows"], tensors["sums"], strict=True)}


def weights_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over (name, dtype, bytes) of tensors, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
