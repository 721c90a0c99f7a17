"""Rows of one text, or of two joined by the tokenizer, laid out for a head that reads one state of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmrecipe.data.collate import Batch, Sequence
from llmrecipe.engine.role_models import Roles


def text_batch(rows: list[dict[str, Any]], roles: Roles, extra: dict[str, Tensor], packed: bool) -> Batch:
    """Lay token rows with `ids` (+ `type_ids`) out; none of their tokens is a target.

    Args:
        extra: tensors of the objective, such as labels.
        packed: False where the head needs one row a sequence.
    """
    sequences = [Sequence(r["ids"], [0] * len(r["ids"]), prompt=len(r["ids"])) for r in rows]
    batch = roles.layout(sequences, [r["row"] for r in rows], extra, packed)
    if rows and rows[0].get("type_ids") and batch.layout is None:
        types = torch.zeros_like(batch.here.input_ids)
        for i, row in enumerate(rows):
            types[i, : len(row["type_ids"])] = torch.tensor(row["type_ids"])
        batch = batch.with_extra(token_type_ids=types)
    return batch
