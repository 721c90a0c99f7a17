"""From the states of a sequence's tokens to one vector.

Letters: R rows, T columns, S sequences, D hidden width, M real tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from llmrecipe.data.collate import Batch
from llmrecipe.data.transfer import to_device
from llmrecipe.engine.logprob import upcast

LAYERS: dict[str, tuple[int, ...]] = {
    "cls": (-1,),
    "last": (-1,),
    "avg": (-1,),
    "avg_top2": (-1, -2),
    "avg_first_last": (1, -1),
}
"""Pooling -> layers whose mean is pooled; 0 are the embeddings, 1 is the output of the first block."""


@dataclass(frozen=True)
class Pool:
    """How the states of a sequence become one vector."""

    kind: str = "last"
    """Its first token, its last, or the mean over all its tokens (see `LAYERS`)."""
    head: str | None = None
    """Role of a head of the model that the vector goes through."""
    cuts: tuple[int, ...] = ()
    """Sequences at which a new chunk begins. Chunks are computed one after the other and again in the backward pass, so the
    memory is that of one chunk, whatever the number of sequences that are compared."""

    def chunks(self, sequences: int) -> list[tuple[int, int]]:
        """Return (first, last) of each chunk, the last sequence excluded."""
        borders = [0, *self.cuts, sequences]
        return list(pairwise(borders))


def chunk_cuts(lengths: Sequence[int], texts: int | None, tokens: int | None) -> tuple[int, ...]:
    """Return the sequences at which new chunks begin, of at most `texts` sequences and `tokens` tokens each (None: any).

    Examples:
        >>> chunk_cuts([4, 4, 4, 9, 2], texts=2, tokens=10)
        (2, 3, 4)
    """
    cuts: list[int] = []
    start, held = 0, 0
    for place, length in enumerate(lengths):
        full = (texts is not None and place - start >= texts) or (tokens is not None and held + length > tokens)
        if place > start and full:
            cuts.append(place)
            start, held = place, 0
        held += length
    return tuple(cuts)


def pool_states(batch: Batch, layers: Sequence[Tensor], kind: str) -> Tensor:
    """Return one vector a sequence, (S, D), in float32 at least, from the states (R, T, D) of one layer or several."""
    wide = upcast(layers[0]) if len(layers) == 1 else sum((upcast(h) for h in layers[1:]), upcast(layers[0])) / len(layers)
    flat = wide.reshape(-1, wide.shape[-1])
    if kind == "last":
        return flat[batch.last]
    places, owner = real_tokens(batch.here)
    if kind == "cls":
        starts = torch.ones_like(owner, dtype=torch.bool)
        starts[1:] = owner[1:] != owner[:-1]
        return flat[to_device(places[starts], flat.device)]
    counts = to_device(torch.bincount(owner, minlength=batch.sequences), flat.device)
    places, owner = to_device(places, flat.device), to_device(owner, flat.device)
    sums = flat.new_zeros(batch.sequences, flat.shape[-1]).index_add(0, owner, flat[places])
    return sums / counts.unsqueeze(-1)


def real_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the flat index (M,) of every real token and the sequence (M,) it belongs to; sequences have no parents."""
    device = batch.input_ids.device
    if batch.layout is None:
        assert batch.attention_mask is not None, "rows that are not packed have a mask"
        places = batch.attention_mask.flatten().nonzero().squeeze(-1)
        return places, places // batch.input_ids.shape[1]
    lengths = torch.tensor([segment.length for segment in batch.layout.segments], device=device)
    owner = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    return torch.arange(owner.numel(), device=device), owner
