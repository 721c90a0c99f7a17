"""A probe over a few fixed token rows, without a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from llmrecipe.data.collate import Batch
from llmrecipe.methods._base.method import Probe
from llmrecipe.methods._base.stack import Stack
from llmrecipe.objectives.finetuning.sft import Sft
from tests.tiny import roles_for


def token_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of different lengths with a prompt of three tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(count):
        length = 6 + row % 5
        ids = torch.randint(3, 60, (length,), generator=generator).tolist()
        rows.append({"ids": ids, "trained": [0] * 3 + [1] * (length - 3), "row": row})
    return rows


def language_probe(model: nn.Module, packing: bool = True, stack: Stack | None = None, size: int = 4) -> Probe:
    """Batches of `token_rows` with the mean token loss."""
    objective, roles = Sft(), roles_for(model, stack, packing)
    rows = token_rows(64)

    def batches(n: int, count: int | None = None) -> Iterator[Batch]:
        each = count or size
        for i in range(n):
            yield objective.collate([rows[(i * each + j) % len(rows)] for j in range(each)], roles)

    def loss(batch: Batch) -> torch.Tensor:
        return objective.loss(batch, roles).total / objective.weight(batch)

    return Probe(batches, loss, None, objective.weight, engine=roles.engine)
