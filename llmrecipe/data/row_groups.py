"""Rows of a padded batch in groups of equal length, for models whose states depend on the padding.

Letters: R rows, T columns, L tokens of each row of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipe.data.collate import Batch, Slots
from llmrecipe.data.transfer import to_device

BY_COLUMN = ("token_type_ids", "embedding_noise")
"""Tensors (R, T, ...) of `Batch.extra` that a model reads."""
BY_ENCODER_COLUMN = ("encoder_ids", "encoder_mask", "encoder_noise")
"""Those of an encoder's rows, (R, T', ...)."""


@dataclasses.dataclass(frozen=True)
class RowGroup:
    """Rows of one length, cut out of a padded batch."""

    rows: list[int]
    """Their places in the batch."""
    first: Tensor
    """(r,) column of each row's first token."""
    batch: Batch
    """What a pass reads of them, (r, L); it has no targets."""

    def spread(self, states: Tensor, columns: int) -> Tensor:
        """Return states (r, L, ...) at their columns of rows (r, T, ...), with zeros in the padding."""
        length = states.shape[1]
        tail = [0] * (2 * (states.dim() - 2))
        firsts = self.first.tolist()
        if len(set(firsts)) == 1:
            return F.pad(states, (*tail, firsts[0], columns - length - firsts[0]))
        return torch.cat([F.pad(s, (*tail, a, columns - length - a)) for s, a in zip(states.split(1), firsts, strict=True)])


def groups_by_length(batch: Batch, alone: bool = False) -> list[RowGroup]:
    """Return the rows of a padded batch by length (of an encoder-decoder: by both lengths), or each as a group of its own."""
    if batch.host is not None:
        device = batch.input_ids.device
        return [dataclasses.replace(g, batch=g.batch.to(device)) for g in groups_by_length(batch.host, alone)]
    assert batch.attention_mask is not None, "rows that are not packed have a mask"
    mask = batch.attention_mask
    lengths: list[tuple[int, ...]] = [(int(n),) for n in mask.sum(1).tolist()]
    if "encoder_mask" in batch.extra:
        read = batch.extra["encoder_mask"].sum(1).tolist()
        lengths = [(*own, int(n)) for own, n in zip(lengths, read, strict=True)]
    found: dict[tuple[int, ...], list[int]] = {}
    for row, length in enumerate(lengths):
        found.setdefault((*length, row) if alone else length, []).append(row)
    return [_group(batch, rows) for rows in found.values()]


def by_groups(
    batch: Batch, compute: Callable[[Batch], tuple[list[Tensor], Tensor | None]], alone: bool, whole: bool = False
) -> tuple[list[Tensor], Tensor | None]:
    """Compute the tensors of a padded batch group by group.

    Args:
        compute: returns tensors of a batch, (r, L, ...) each, and the loss the model itself adds, if any.
        alone: each row is a group.
        whole: the tensors are (r, ...), one entry a row.

    Returns:
        The tensors of all rows, (R, T, ...) or (R, ...), and the mean of the losses over the tokens.
    """
    groups = groups_by_length(batch, alone)
    parts: list[list[Tensor]] = []
    total: Tensor | None = None
    for group in groups:
        tensors, own = compute(group.batch)
        parts.append(tensors if whole else [group.spread(t, batch.input_ids.shape[1]) for t in tensors])
        if own is not None:
            own = own * (group.batch.tokens / max(sum(g.batch.tokens for g in groups), 1))
            total = own if total is None else total + own
    order = to_device(torch.tensor([row for group in groups for row in group.rows]).argsort(), batch.input_ids.device)
    return [torch.cat(tensors)[order] for tensors in zip(*parts, strict=True)], total


def _group(batch: Batch, rows: list[int]) -> RowGroup:
    """Cut out rows of equal length."""
    mask = batch.attention_mask
    assert mask is not None
    picked = torch.tensor(rows, device=mask.device)
    first = mask[picked].argmax(1)
    length = int(mask[rows[0]].sum())

    def cut(values: Tensor, firsts: Tensor, count: int) -> Tensor:
        columns = firsts[:, None] + torch.arange(count, device=values.device)
        return values[picked[:, None], columns]

    extra = {k: cut(v, first, length) if k in BY_COLUMN else v for k, v in batch.extra.items()}
    if "encoder_mask" in batch.extra:
        read = batch.extra["encoder_mask"]
        begin, count = read[picked].argmax(1), int(read[rows[0]].sum())
        extra |= {k: cut(batch.extra[k], begin, count) for k in BY_ENCODER_COLUMN if k in batch.extra}
    none = batch.source[:0]
    part = dataclasses.replace(
        batch,
        input_ids=cut(batch.input_ids, first, length),
        position_ids=cut(batch.position_ids, first, length),
        attention_mask=cut(mask, first, length),
        source=none, target=none, sequence=none, last=none, sequences=0,
        task_ids=None if batch.task_ids is None else cut(batch.task_ids, first, length),
        prompt_lengths=None if batch.prompt_lengths is None else batch.prompt_lengths[picked],
        slots=_slots(batch, rows, first, length),
        tokens=length * len(rows),
        extra=extra,
    )  # fmt: skip
    return RowGroup(rows, first, part)


def _slots(batch: Batch, rows: list[int], first: Tensor, length: int) -> Slots | None:
    """Return the places of features in some rows, as places of the group."""
    if batch.slots is None:
        return None
    width = batch.input_ids.shape[1]
    number = {row: place for place, row in enumerate(rows)}
    owner, column = batch.slots.index // width, batch.slots.index % width
    kept = torch.tensor([i for i, row in enumerate(owner.tolist()) if row in number], dtype=torch.long, device=owner.device)
    if not len(kept):
        return None
    own = torch.tensor([number[row] for row in owner[kept].tolist()], device=owner.device)
    index = own * length + column[kept] - first[own]
    return Slots(batch.slots.values[kept], index, batch.slots.place[kept], own)
