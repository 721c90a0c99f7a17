"""Causal language modelling."""

from __future__ import annotations

from typing import Any, ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.base import Loss, Measures, Objective
from llmrecipe.objectives.token_math import TOKEN_METRICS, collate_tokens, token_loss


@register
class Clm(Objective):
    """Causal language modelling: L = -(1/N) sum_t log P(x_t | x_<t), over all tokens after the first of each document.

    Documents start with the tokenizer's beginning token where it has one and end with the end token, both predicted except
    the very first. N counts predicted tokens over the whole optimizer step. Perplexity is exp(L) over the whole set.

    Source: next-token prediction as in GPT-2; shift and counting as in the transformers loss for causal models.
    """

    rows: ClassVar[str] = "text"
    head: ClassVar[str] = "causal"

    def loss_mask(self) -> str:
        """Train on every token."""
        return "all"

    def measures(self) -> Measures:
        """Return the metrics of the predicted tokens."""
        return TOKEN_METRICS

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay documents out for one forward pass."""
        return collate_tokens(rows, roles)

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed negative log-likelihood."""
        return token_loss(batch, roles)
