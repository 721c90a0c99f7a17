"""Reference log-probabilities, cached by row so that each row is scored once.

A cache file is keyed by what the numbers depend on: token rows, reference weights, dtype and engine version. It is stored
next to the token cache and only ever read under the same key. Its checksum is verified when it is read; the rows of a damaged
file are scored again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmrecipe.core.errors import LlmRecipeError
from llmrecipe.core.paths import cache_root
from llmrecipe.data.collate import Batch
from llmrecipe.runs.durable import follow_folder

logger = logging.getLogger("llmrecipe")

VERSION = "1"
"""Changes when the log-prob engine changes what it computes."""


NAMED = ("initial", "base", "none")
"""References that are no other model's folder."""


class ReferenceCache:
    """Summed log-probabilities of the sequences of a row, float32, by the row's content key."""

    def __init__(self, path: Path | None = None):
        self.path = path
        """Named by what the numbers depend on; None keeps them in memory."""
        self.known: dict[int, Tensor] = {}
        self.complete = False
        """Whether every row of the run is here; a missing one can then no longer be scored."""
        self.misses = 0
        if path is not None and path.exists():
            self._read(path)

    @property
    def name(self) -> str:
        """Return the name that identifies the reference in a checkpoint; empty where nothing is stored on disk."""
        return self.path.stem if self.path is not None else ""

    def get(self, batch: Batch) -> Tensor | None:
        """Return the sums (S,) in the batch's order, or None when a row is missing."""
        if not batch.keys or any(key not in self.known for key in batch.keys):
            if self.complete and batch.keys:
                raise LlmRecipeError("a row has no reference log-probabilities although all rows were scored before step 0")
            return None
        return torch.cat([self.known[key] for key in batch.keys])

    def put(self, batch: Batch, sums: Tensor) -> None:
        """Store the sums (S,) of a batch whose rows hold equally many sequences each."""
        if not batch.keys:
            return
        self.misses += len(batch.keys)
        for key, values in zip(batch.keys, sums.detach().float().cpu().chunk(len(batch.keys)), strict=True):
            self.known[key] = values.clone()

    def save(self) -> None:
        """Write the cache to its file."""
        if self.path is None or not self.misses:
            return
        index = sorted(self.known)
        tensors = {"keys": torch.tensor(index, dtype=torch.int64), "sums": torch.stack([self.known[i] for i in index])}
        write_scores(self.path, tensors)

    def _read(self, path: Path) -> None:
        tensors = read_scores(path, ("keys", "sums"))
        self.known = {int(key): sums for key, sums in zip(tensors["keys"], tensors["sums"], strict=True)} if tensors else {}


def write_scores(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors with their checksum to a temporary file and move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, str(aside), metadata={"sha256": weights_digest(tensors)})
    follow_folder(aside, path.parent)
    os.replace(aside, path)


def read_scores(path: Path, names: Seq[str]) -> dict[str, Tensor]:
    """Return the tensors of a file of `write_scores`; of a damaged one nothing, and the file is removed."""
    try:
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in names}
            wanted = (file.metadata() or {}).get("sha256")
        if wanted is not None and weights_digest(tensors) != wanted:
            raise ValueError("its checksum differs")
    except (OSError, ValueError, SafetensorError) as error:
        logger.warning("%s: these reference scores are damaged (%s); they are computed again", path, error)
        path.unlink(missing_ok=True)
        return {}
    return tensors


def weights_digest(tensors: dict[str, Tensor]) -> str:
    """Hash (name, dtype, shape, bytes) of tensors with SHA-256, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def cache_file(facts: dict[str, Any]) -> Path:
    """Return the file of numbers that depend on these facts and on the engine's version."""
    digest = hashlib.sha256(json.dumps({"version": VERSION, **facts}, sort_keys=True).encode()).hexdigest()[:24]
    return cache_root() / "reference" / f"{digest}.safetensors"
