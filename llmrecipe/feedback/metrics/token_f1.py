"""Token F1."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.answer_match import word_f1
from llmrecipe.core.registry import register
from llmrecipe.feedback.metric import Metric


@register
class TokenF1(Metric):
    """Token F1: harmonic mean of precision and recall of the bags of normalised words; 0 where either bag is empty alone.

    Normalised as SQuAD does: lower case, no articles, no punctuation. Source: SQuAD (arXiv 1606.05250).
    """

    example: ClassVar[tuple[str, str, float]] = ("The red hen", "a red hen sat", 0.8)

    def score(self, prediction: str, reference: str) -> float:
        """Compute F = 2 P R / (P + R)."""
        return word_f1(prediction, reference)
