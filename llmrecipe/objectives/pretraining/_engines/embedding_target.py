"""Embeddings as targets: the squared error of states against the embeddings of the clean tokens.

Targets never receive a gradient: with one, states and embeddings both shrink, and the loss falls without anything learned.

Letters: N positions, V tokens, D hidden width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipe.engine.logprob import chunk_rows, upcast
from llmrecipe.models import task_heads
from llmrecipe.models.heads.table_head import TableHead

if TYPE_CHECKING:
    from llmrecipe.models.pretrained import LanguageModel

HEAD = "embedding_target"
"""Role of the stored targets."""
DECAY = 0.999
"""Share of the old targets in their moving average, after each step."""
COLLAPSED = 0.01
"""Share of the first variance of the targets below which they have collapsed."""


def squared_errors(states: Tensor, target: Tensor, table: Tensor) -> Tensor:
    """Return ||x_n - e(y_n)||^2, (N,), of states (N, D) and the rows of a table (V, D) for the tokens (N,)."""
    return (upcast(states) - table[target]).square().sum(-1)


@torch.no_grad()
def nearest_rows(states: Tensor, table: Tensor) -> Tensor:
    """Return the row of a table (V, D) that is nearest to each state, (N,), in chunks."""
    norms = table.square().sum(-1)
    size = chunk_rows(len(table), states.device)
    found = [(norms - 2.0 * part @ table.T).argmin(-1) for part in upcast(states).split(size)]
    return torch.cat(found)


def variance(table: Tensor) -> float:
    """Return the variance of the rows of a table (V, D), the mean over D."""
    return float(table.double().var(0, unbiased=False).mean())


@torch.no_grad()
def target_table(model: LanguageModel, kind: str) -> Tensor:
    """Return the targets of all tokens, (V, D): the stored ones, or the embeddings normed to mean 0 and variance 1."""
    if kind == "layernorm":
        weight = upcast(model.get_input_embeddings().weight)
        return F.layer_norm(weight, weight.shape[-1:])
    return upcast(_stored(model))


@torch.no_grad()
def follow_embeddings(model: LanguageModel) -> None:
    """Move the stored targets towards the embeddings: e <- 0.999 e + 0.001 E."""
    table = _stored(model)
    table.lerp_(model.get_input_embeddings().weight.to(table), 1.0 - DECAY)


def _stored(model: LanguageModel) -> Tensor:
    head = model.get_submodule(f"{task_heads.ATTRIBUTE}.{HEAD}")
    assert isinstance(head, TableHead)
    return head.table


def store_targets(model: LanguageModel) -> None:
    """Keep the embeddings as they are; those of a run that is continued stay."""
    task_heads.add_table(model, HEAD, model.get_input_embeddings().weight)
