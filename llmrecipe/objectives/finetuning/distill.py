"""Distillation: a student learns a teacher's distributions over the next token."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.option_types import Literal, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.objectives.base import Objective
from llmrecipe.objectives.finetuning._engines.distilled import Distilled


@register
class Distill(Distilled, Objective):
    """Distillation: L = (1/N) sum over supervised tokens of [T^2 D(P_t, Q_t) - c log Q(y_t | y_<t, x)].

    P is the teacher's distribution, Q the student's, both softmax(logits / T) within D; c is `nll_coef`. D is KL(P || Q),
    KL(Q || P), or the generalised Jensen-Shannon divergence beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q.
    Logits of both models exist for a chunk of positions at a time. Heads of unlike width are compared over the tokens that both
    have.

    With `top_k` the teacher's K likeliest tokens of every row are computed once, before the student is loaded, and kept in
    `$LLMRECIPE_CACHE`; all other tokens are one further class, of the probability that is left. `divergence: uld` compares
    sorted probabilities, across tokenizers, of texts that both models read in their own tokens; `nll_coef=1` belongs to it.

    Papers: Distilling the knowledge in a neural network (arXiv 1503.02531); GKD (arXiv 2306.13649); ULD (arXiv 2402.12030).
    """

    rows: ClassVar[str] = "dialogue"
    head: ClassVar[str] = "causal"
    roles: ClassVar[tuple[str, ...]] = ("teacher",)

    divergence: Literal["forward_kl", "reverse_kl", "jsd", "uld"] = "forward_kl"
    """Divergence of the student from the teacher."""
    top_k: PositiveInt | None = None
    """Keep the teacher's K likeliest tokens; null keeps the teacher in memory and compares all tokens."""
