"""Exact match."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.answer_match import normalise
from llmrecipe.core.registry import register
from llmrecipe.feedback.metric import Metric


@register
class ExactMatch(Metric):
    """Exact match: 1 when the normalised prediction equals the normalised reference, else 0.

    Only white space is normalised unless options say more. Source: SQuAD (arXiv 1606.05250) for the full normalisation.
    """

    example: ClassVar[tuple[str, str, float]] = ("the  red hen", "the red hen", 1.0)

    lower: bool = False
    """Ignore case."""
    articles: bool = False
    """Ignore English articles."""
    punctuation: bool = False
    """Ignore punctuation."""

    def score(self, prediction: str, reference: str) -> float:
        """Return 1 where the normalised texts are equal, else 0."""
        return float(
            normalise(prediction, self.lower, self.articles, self.punctuation)
            == normalise(reference, self.lower, self.articles, self.punctuation)
        )
