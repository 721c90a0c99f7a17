"""Exact match."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.answer_match import normalise
from llmrecipe.core.registry import register
from llmrecipe.feedback.metric import Metric


@register
class ExactMatch(Metric):
    """Exact match: 1 when the prediction equals the reference up to white space, else 0; `squad_match` ignores more."""

    example: ClassVar[tuple[str, str, float]] = ("the  red hen", "the red hen", 1.0)

    def score(self, prediction: str, reference: str) -> float:
        """Return 1 where the texts are equal, with runs of white space as one space and none at the ends, else 0."""
        return float(normalise(prediction) == normalise(reference))
