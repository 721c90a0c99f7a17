"""Causal language modelling."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from llmrecipe.core.option_types import NonNegativeFloat
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.base import Loss, Measures, Objective
from llmrecipe.objectives.token_math import TOKEN_METRICS, collate_tokens, token_loss, token_metrics

SIZES = ("bytes", "words")
"""Columns of token rows: how much text their targets stand for."""
UNKNOWN = -1
WORD = "nll_per_word"


@register
class Clm(Objective):
    """Causal language modelling: L = -(1/N) sum_t log P(x_t | x_<t), over all tokens after the first of each document.

    Documents start with the tokenizer's beginning token where it has one and end with the end token, both predicted except
    the very first. N counts predicted tokens over the whole optimizer step. Perplexity is exp(L) over the whole set.

    Evaluation also divides by the text that the targets stand for, which does not depend on the tokenizer: bits per byte
    -(1/B) sum_t log2 P(x_t | x_<t), B the bytes in UTF-8; byte and word perplexity are exp of the sum over bytes and over the
    words between white space. A document longer than a row is read in windows that predict each token once (`data.stride`).

    `z_loss` adds z_loss (1/N) sum_t (log Z_t)^2 while training, Z_t = sum_v exp(z_tv) the denominator of the softmax of logits
    z: logits do not drift to where bfloat16 is coarse. `loss` is without it; `log_z_squared` is the mean of (log Z_t)^2.

    Source: next-token prediction as in GPT-2; shift and counting as in the transformers loss for causal models; z-loss as in
    PaLM (arXiv 2204.02311).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    rows: ClassVar[str] = "text"
    headline: ClassVar[tuple[str, ...]] = ("bits_per_byte", "accuracy")
    head: ClassVar[str] = "causal"
    special_tokens: ClassVar[tuple[str, ...]] = ("eos",)

    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared logarithm of the softmax's denominator, 1e-4 in PaLM; 0: none."""

    def loss_mask(self) -> str:
        """Train on every token."""
        return "all"

    def measures(self) -> Measures:
        """Return the metrics of the predicted tokens, and of the text they stand for."""
        return {**TOKEN_METRICS, "bits_per_byte": "min", "byte_perplexity": "min", "word_perplexity": "min"}

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay documents out for one forward pass."""
        sizes = {name: torch.tensor([float(row.get(name, UNKNOWN)) for row in rows], dtype=torch.float64) for name in SIZES}
        return collate_tokens(rows, roles).with_extra(**sizes)

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed negative log-likelihood, and the penalty on the denominators."""
        return token_loss(batch, roles, z_loss=self.z_loss)

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Return loss and token metrics, and the negative log-likelihood over the bytes and words of rows of known size."""
        out = roles.policy(batch)
        nll = -out["logprobs"].detach()
        found = {"loss": (nll.sum(), self.weight(batch)), **token_metrics(out)}
        # Rows of ready-made token ids stand for text of unknown size. A batch without rows still has one sequence, a filler.
        if not set(SIZES) <= set(batch.extra):
            return found
        sizes = {name: batch.extra[name] for name in SIZES}
        by_row = batch.sum_by_sequence(nll.double())[: len(sizes["bytes"])]
        known = float(by_row[sizes["bytes"] >= 0].sum())
        total = {name: float(values.clamp(min=0).sum()) for name, values in sizes.items()}
        return {**found, "bits_per_byte": (known / math.log(2.0), total["bytes"]), WORD: (known, total["words"])}

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, torch.Tensor]) -> dict[str, float]:
        """Return the perplexities of bytes and words, where the text is known."""
        word, bits = sums.pop(WORD, math.nan), sums.get("bits_per_byte", math.nan)
        if math.isnan(bits):
            sums.pop("bits_per_byte", None)
            return {}
        return {"byte_perplexity": 2.0**bits, "word_perplexity": math.exp(min(word, 700.0))}
