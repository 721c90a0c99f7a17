"""Sequences taken out of a batch that is laid out already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from llmrecipe.core.forward_context import Layout
from llmrecipe.data.collate import Batch, Sequence, Slots


def part_of_batch(batch: Batch, first: int, last: int) -> Batch:
    """Return the sequences first <= s < last of a batch whose sequences have no parents, in the layout of the batch.

    Padding that none of them needs is left out; of `extra` only what the model itself reads (`token_type_ids`) is kept.
    """
    if batch.host is not None:
        return part_of_batch(batch.host, first, last).to(batch.input_ids.device)
    width = batch.input_ids.shape[1]
    prompts = batch.prompt_lengths
    if batch.layout is not None:
        segments = batch.layout.segments[first:last]
        top, left, right = 0, segments[0].start, segments[-1].start + segments[-1].length
        layout = Layout(tuple(replace(s, start=s.start - left) for s in segments), 1, right - left)
        rows = slice(None)
    else:
        assert batch.attention_mask is not None, "rows that are not packed have a mask"
        rows, top, layout = slice(first, last), first, None
        real = batch.attention_mask[rows].any(0).nonzero()
        left, right = int(real[0]), int(real[-1]) + 1

    def moved(places: Tensor) -> Tensor:
        return (places // width - top) * (right - left) + places % width - left

    def shown(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows, left:right]

    mask = shown(batch.attention_mask)
    own = (batch.sequence >= first) & (batch.sequence < last)
    types = {k: v[rows, left:right] for k, v in batch.extra.items() if k == "token_type_ids"}
    return Batch(
        input_ids=batch.input_ids[rows, left:right],
        position_ids=batch.position_ids[rows, left:right],
        attention_mask=mask,
        layout=layout,
        source=moved(batch.source[own]),
        target=batch.target[own],
        sequence=batch.sequence[own] - first,
        sequences=last - first,
        last=moved(batch.last[first:last]),
        task_ids=shown(batch.task_ids),
        prompt_lengths=None if prompts is None or layout is not None else prompts[rows],
        tokens=right - left if mask is None else int(mask.sum()),
        slots=None if batch.slots is None else _part_of_slots(batch.slots, first, last, moved),
        extra=types,
    )


def _part_of_slots(slots: Slots, first: int, last: int, moved: Callable[[Tensor], Tensor]) -> Slots | None:
    """Return the places of features that sequences first <= s < last have, moved to where these are; None without any."""
    own = (slots.sequence >= first) & (slots.sequence < last)
    if not bool(own.any()):
        return None
    return Slots(slots.values[own], moved(slots.index[own]), slots.place[own], slots.sequence[own] - first)


def sequences_in(batch: Batch) -> list[Sequence]:
    """Return the sequences that a batch was laid out from, whichever the layout: tokens and targets, in their order.

    They have no parents and no features.
    """
    batch = batch.here
    width = batch.input_ids.shape[1]
    if batch.layout is not None:
        spans = [(0, segment.start, segment.length) for segment in batch.layout.segments]
    else:
        assert batch.attention_mask is not None, "rows that are not packed have a mask"
        starts, lengths = batch.attention_mask.argmax(1).tolist(), batch.attention_mask.sum(1).tolist()
        spans = [(row, start, length) for row, (start, length) in enumerate(zip(starts, lengths, strict=True))]
    trained = torch.zeros(batch.input_ids.numel(), dtype=torch.long)
    trained[batch.source + 1] = 1
    ids, trained = batch.input_ids, trained.view(-1, width)
    found = []
    for row, start, length in spans:
        marks = trained[row, start : start + length].tolist()
        prompt = marks.index(1) if 1 in marks else length
        found.append(Sequence(ids[row, start : start + length].tolist(), marks, prompt=prompt))
    return found
