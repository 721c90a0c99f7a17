"""Noise on the embeddings that a model reads, drawn for each row by itself.

Letters: R rows, T columns, S sequences, L tokens of a sequence, D width of the embeddings.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.row_draws import generator

OWN, READ = 2, 3
"""Numbers of a row's random sequences: for the tokens of the batch, and for those an encoder reads."""


def noise_of_rows(batch: Batch, noises: list[Tensor]) -> Tensor:
    """Lay the noise (T_i, D) of each row out as its tokens are, (R, T, D)."""
    width = noises[0].shape[-1] if noises else 1
    flat = torch.zeros(batch.input_ids.numel(), width)
    for last, noise in zip(batch.here.last.tolist(), noises, strict=False):
        flat[last - len(noise) + 1 : last + 1] = noise
    return flat.view(*batch.input_ids.shape, width)


def uniform_noise(draws: np.random.Generator, length: int, width: int, alpha: float) -> Tensor:
    """Return NEFTune's noise of one sequence, (L, D): alpha / sqrt(L D) times numbers drawn evenly from [-1, 1).

    Source: NEFTune (arXiv 2310.05914).
    """
    return torch.from_numpy(2.0 * draws.random((length, width), dtype=np.float32) - 1.0) * (alpha / math.sqrt(length * width))


def noise_draws(rows: list[dict[str, Any]]) -> Tensor:
    """Return which random numbers each row's noise is made of, (S, 2): its epoch, -1 without one, and its place in the data."""
    return torch.tensor([[-1 if row.get("epoch") is None else row["epoch"], row["row"]] for row in rows]).view(-1, 2)


def with_uniform_noise(batch: Batch, draws: Tensor, roles: Roles, alpha: float) -> Batch:
    """Return the batch with NEFTune's noise on what the model reads, an encoder's rows included.

    L is the length of the sequence, without padding and without the other documents of a packed row.

    Args:
        draws: what `noise_draws` returned for the rows.
    """
    width = int(roles.model.get_input_embeddings().weight.shape[-1])

    def noise(lengths: list[int], number: int) -> list[Tensor]:
        pairs = zip(draws.tolist(), lengths, strict=False)
        return [
            uniform_noise(generator(roles.seed, None if epoch < 0 else epoch, row, number), length, width, alpha)
            for (epoch, row), length in pairs
        ]

    here = batch.here
    added = {"embedding_noise": noise_of_rows(here, noise(_lengths(here), OWN))}
    if "encoder_mask" in here.extra:
        mask = here.extra["encoder_mask"]
        found = torch.zeros(*mask.shape, width)
        for place, one in enumerate(noise(mask.sum(1).tolist(), READ)):
            found[place, : len(one)] = one
        added["encoder_noise"] = found
    return batch.with_extra(**added)


def without_noise(batch: Batch) -> Batch:
    """Return the batch as the model reads it without noise."""
    noise = ("embedding_noise", "encoder_noise")
    return replace(batch, extra={name: value for name, value in batch.extra.items() if name not in noise})


def _lengths(batch: Batch) -> list[int]:
    """Return the number of tokens of each sequence, (S,)."""
    if batch.layout is not None:
        return [segment.length for segment in batch.layout.segments]
    assert batch.attention_mask is not None, "rows that are not packed have a mask"
    return [int(length) for length in batch.attention_mask.sum(1).tolist()]
