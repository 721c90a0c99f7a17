"""Texts that a hypermodel reads before a batch: padded, one row an adapter, in the order of the tasks of the batch's tokens."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from llmrecipe.data.collate import Batch
from llmrecipe.data.transfer import to_device
from llmrecipe.engine.role_models import Roles


def padded_texts(texts: Seq[list[int]], roles: Roles) -> tuple[Tensor, Tensor]:
    """Return ids and mask (K, T') of texts on the device; a row of padding alone where there are none."""
    ids, mask = padded_on_host(texts, roles.pad_id)
    return to_device(ids, roles.device), to_device(mask, roles.device)


def padded_on_host(texts: Seq[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask (K, T') of texts on the host; a row of padding alone where there are none."""
    known = list(texts) or [[]]
    width = max(1, *map(len, known))
    ids = torch.tensor([text + [pad_id] * (width - len(text)) for text in known])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in known])
    return ids, mask


def with_examples(batch: Batch, texts: Seq[list[int]], roles: Roles, others: Seq[list[int]] | None = None) -> Batch:
    """Return a batch whose adapters are made from these texts (see `Batch.context`).

    Args:
        others: texts that say nothing about the rows, for comparison (see `under_others`).
    """
    ids, mask = padded_on_host(texts, roles.pad_id)
    batch = batch.with_extra(example_ids=ids, example_mask=mask)
    if others is None:
        return batch
    ids, mask = padded_on_host(others, roles.pad_id)
    return batch.with_extra(other_ids=ids, other_mask=mask)


def under_others(batch: Batch) -> Batch | None:
    """Return a batch whose adapters are made from its other texts; None where it has none."""
    if "other_ids" not in batch.extra:
        return None
    return batch.with_extra(example_ids=batch.here.extra["other_ids"], example_mask=batch.here.extra["other_mask"])
