"""Reference log-probabilities, remembered by row so that each row is scored once.

A cache file is keyed by what the numbers depend on: token rows, reference weights, dtype and engine version. It lies beside
the token cache and is only ever read back under the same key.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmrecipe.data.batch import Batch

from llmrecipe.errors import LlmRecipeError

if TYPE_CHECKING:
    from llmrecipe.training.run import Run

VERSION = "1"
"""Changes when the log-prob engine changes what it computes."""


SMALL = 0.1
"""Up to this share of the model the trained tensors are kept twice; beyond it all rows are scored before step 0."""


class ReferenceCache:
    """Summed log-probabilities of the sequences of a row, float32, by the row's content key."""

    def __init__(self, path: Path | None = None):
        self.path = path
        self.known: dict[int, Tensor] = {}
        self.complete = False
        """Whether every row of the run is here, so that a missing one cannot be scored any more."""
        self.hits = 0
        self.misses = 0
        if path is not None and path.exists():
            self._read(path)

    def get(self, batch: Batch) -> Tensor | None:
        """(S,) sums in the batch's order, or None when a row is missing."""
        if not batch.keys or any(key not in self.known for key in batch.keys):
            if self.complete and batch.keys:
                raise LlmRecipeError("a row has no reference log-probabilities although all rows were scored before step 0")
            return None
        self.hits += len(batch.keys)
        return torch.cat([self.known[key] for key in batch.keys])

    def put(self, batch: Batch, sums: Tensor) -> None:
        """Remember the sums of a batch whose rows hold equally many sequences each."""
        if not batch.keys:
            return
        self.misses += len(batch.keys)
        for key, values in zip(batch.keys, sums.detach().float().cpu().chunk(len(batch.keys)), strict=True):
            self.known[key] = values.clone()

    def save(self) -> None:
        """Write the cache aside and move it into place."""
        if self.path is None or not self.misses:
            return
        from safetensors.torch import save_file

        self.path.parent.mkdir(parents=True, exist_ok=True)
        index = sorted(self.known)
        tensors = {"keys": torch.tensor(index, dtype=torch.int64), "sums": torch.stack([self.known[i] for i in index])}
        aside = self.path.with_suffix(f".{os.getpid()}.tmp")
        save_file(tensors, str(aside))
        os.replace(aside, self.path)

    def _read(self, path: Path) -> None:
        from safetensors.torch import load_file

        tensors = load_file(str(path))
        self.known = {int(key): sums for key, sums in zip(tensors["keys"], tensors["sums"], strict=True)}


def weights_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over (name, dtype, bytes) of tensors, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def take(run: Run) -> None:
    """Make the policy of step 0 available for the whole run. Call with the model as step 0 has it.

    Stacks that can be switched off need nothing. A small trained part is remembered and swapped in. Where most weights
    train, every row the run will use is scored now, so that no second model is ever held.
    """
    if "reference" not in run.objective.roles:
        return
    run.roles.cache = ReferenceCache(cache_path(run))
    if run.stack.reference_is_off() and run.opened.continued is None:
        return
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in run.model.parameters())
    if trained <= SMALL * total:
        run.stack.take_reference(run.model)
        return
    score_all(run)
    run.roles.cache.complete = True
    run.roles.cache.save()


def score_all(run: Run) -> None:
    """Score the rows of every step the run will make, and of the validation split."""
    from llmrecipe.training import assemble

    size, per_epoch = run.recipe.batch.size, run.steps_per_epoch
    epochs = math.ceil(run.steps / per_epoch)
    used = range(len(run.data)) if epochs > 1 else run.order(0)[: run.steps * size]
    # The test split's rows are scored under the untrained policy only; no metric of them is looked at before the end.
    others = [split for split in (run.validation, assemble.test_rows(run)) if split is not None]
    with torch.no_grad(), run.roles.evaluating():
        for data, indices in [(run.data, used), *((split, range(len(split))) for split in others)]:
            for part in run.roles.split([data[int(i)] for i in indices]):
                batch = run.objective.collate(part, run.roles)
                if batch.keys and run.roles.cache.get(batch) is None:
                    run.roles.cache.put(batch, batch.sum_by_sequence(run.roles.engine(batch)["logprobs"]))


def cache_path(run: Run) -> Path:
    """Where the numbers of this reference lie: keyed by weights, mounted stacks, start of the stack, data and engine."""
    facts: dict[str, Any] = {
        "version": VERSION,
        "base": run.opened.base_fingerprint,
        "layers": [weights_digest(layer.tensors) for layer in run.opened.layers],
        "dtype": str(next(run.model.parameters()).dtype),
        "autocast": str(run.roles.engine.autocast),
        "data": run.data.key,
    }
    if any(not w.starts_at_base() for w in run.stack) or run.opened.continued is not None:
        facts["start"] = weights_digest(run.stack.delta(run.model))
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    root = Path(os.environ.get("LLMRECIPE_CACHE", Path.home() / ".cache" / "llmrecipe"))
    return root / "reference" / f"{digest}.safetensors"
