"""Distillation: a student learns a teacher's distributions over the next token."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.option_types import Annotated, Field, Literal, LossMaskName, NonNegativeFloat, PositiveFloat, PositiveInt
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

    teacher: str = ""
    """Folder, hub name or run directory of the teacher, `tiny`, or the address of a server up to and without /completions."""
    teacher_model: str = ""
    """Name of the model on the teacher's server."""
    key_env: str | None = None
    """Name of the environment variable with the server's bearer token."""
    mask: LossMaskName = "assistant"
    """Which tokens are supervised; for prompt/completion rows `assistant` means the completion."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "uld"] = "forward_kl"
    """Divergence of the student from the teacher."""
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Of `jsd`: weight of the teacher in the mixture; near 0 it goes as beta KL(P || Q), near 1 as (1 - beta) KL(Q || P)."""
    temperature: PositiveFloat = 1.0
    """T, divides the logits of both."""
    squared: bool = True
    """Multiply the divergence by T^2, so that its gradient keeps its size."""
    nll_coef: NonNegativeFloat = 0.0
    """Weight of the cross-entropy with the rows' own tokens."""
    top_k: PositiveInt | None = None
    """Keep the teacher's K likeliest tokens; null keeps the teacher in memory and compares all tokens."""
