"""SQuAD's exact match."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.answer_match import same_answer
from llmrecipe.core.registry import register
from llmrecipe.feedback.metric import Metric


@register
class SquadMatch(Metric):
    """SQuAD's exact match: 1 when prediction and reference are equal without case, articles and punctuation, else 0.

    Source: SQuAD (arXiv 1606.05250).
    """

    example: ClassVar[tuple[str, str, float]] = ("The red hen.", "red hen", 1.0)

    def score(self, prediction: str, reference: str) -> float:
        """Return 1 where the normalised texts are equal, else 0."""
        return same_answer(prediction, reference)
