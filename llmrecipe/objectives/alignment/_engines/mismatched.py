"""Mismatched pairs: each prompt of a step with another row's answer, from which KTO estimates its reference point."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from llmrecipe.data.collate import Batch, Sequence, row_key
from llmrecipe.data.transfer import to_device
from llmrecipe.engine.role_models import Roles


def others(prompts: list[list[int]], answers: list[list[int]]) -> list[int | None]:
    """Find for each row the row whose answer it borrows: the one before it, cyclically.

    A row with the same prompt or the same answer is skipped, since its answer would not be a mismatch; where the whole
    step has one prompt, a different answer is enough. None where no row qualifies.
    """
    found: list[int | None] = []
    size = len(prompts)
    for i in range(size):
        before = [(i - k) % size for k in range(1, size)]
        different = [j for j in before if answers[j] != answers[i]]
        found.append(next((j for j in different if prompts[j] != prompts[i]), different[0] if different else None))
    return found


def with_others(
    rows: list[dict[str, Any]], world: Iterable[list[dict[str, Any]]] | None = None, rank: int = 0
) -> list[dict[str, Any]]:
    """Return the rows with `other_ids`, the answer that each borrows (empty where there is none).

    Args:
        rows: this process's rows of one step; row k of process r is row k * world + r of the step.
        world: every process's rows, by rank; default these rows alone.
        rank: rank of this process.
    """
    shares = [list(part) for part in world] if world is not None else [rows]
    longest = max((len(part) for part in shares), default=0)
    everyone = [part[k] for k in range(longest) for part in shares if k < len(part)]
    mine = [k for k in range(len(everyone)) if k % len(shares) == rank]
    chosen = others([r["prompt_ids"] for r in everyone], [r["completion_ids"] for r in everyone])
    borrowed: list[list[int]] = [[] if (j := chosen[k]) is None else everyone[j]["completion_ids"] for k in mine]
    return [{**row, "other_ids": other} for row, other in zip(rows, borrowed, strict=True)]


def pairs_as_tensors(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pack prompt and borrowed answer of each row that has one into tensors: ids (M, L) filled with -1, prompt lengths (M,)."""
    kept = [r for r in rows if r["other_ids"]]
    lines = [[*r["prompt_ids"], *r["other_ids"]] for r in kept]
    width = max((len(line) for line in lines), default=0)
    ids = torch.tensor([line + [-1] * (width - len(line)) for line in lines], dtype=torch.long).reshape(len(lines), width)
    return {"mismatched": ids, "mismatched_prompt": torch.tensor([len(r["prompt_ids"]) for r in kept], dtype=torch.long)}


def mismatched_batch(batch: Batch, roles: Roles, keyed: bool) -> Batch | None:
    """Lay out the mismatched pairs of a batch; return None where it has none.

    Args:
        keyed: whether their reference log-probabilities may be cached by content.
    """
    sequences: list[Sequence] = []
    keys: list[int] = []
    here = batch.here.extra
    for line, prompt in zip(here["mismatched"].tolist(), here["mismatched_prompt"].tolist(), strict=True):
        ids = [token for token in line if token >= 0]
        sequences.append(Sequence(ids, [0] * prompt + [1] * (len(ids) - prompt), prompt=prompt))
        keys.append(row_key(ids[:prompt], ids[prompt:]))
    if not sequences:
        return None
    return dataclasses.replace(roles.layout(sequences), keys=tuple(keys) if keyed else ())


@torch.no_grad()
def divergences(batch: Batch, roles: Roles) -> Tensor:
    """Compute log pi(y'|x) - log pi_ref(y'|x) of the M mismatched pairs of a batch, (M,)."""
    pairs = mismatched_batch(batch, roles, roles.cache.complete)
    if pairs is None:
        return torch.zeros(0, device=roles.device)
    reference = roles.reference(pairs)
    with roles.evaluating():
        return pairs.sum_by_sequence(roles.engine(pairs)["logprobs"]) - reference


def reference_point(micros: list[Batch], roles: Roles) -> tuple[Tensor, Tensor]:
    """Return (z, raw mean), scalars on the device.

    The raw mean is that of the divergences over all micro-batches and processes of a step, 0 where there is none; z is
    max(raw mean, 0).
    """
    parts = [divergences(m, roles) for m in micros]
    count = to_device(torch.tensor(sum(p.numel() for p in parts), dtype=torch.float64), roles.device)
    total = sum((p.double().sum() for p in parts), torch.zeros_like(count))
    total, count = roles.sum_tensor(torch.stack((total, count)))
    # Pairs are counted, so that the mean over none of them is 0 / 1.
    raw = total / count.clamp_min(1.0)
    return raw.clamp_min(0.0), raw
