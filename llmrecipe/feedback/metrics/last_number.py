"""Last number."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.feedback.metric import Metric
from llmrecipe.feedback.numbers import same_number, states_number


@register
class LastNumber(Metric):
    """Last number: 1 when the last number of the prediction equals the last number of the reference, else 0.

    Numbers are read as in `llmrecipe.feedback.numbers`: signs, separators, fractions, units and LaTeX. The usual check of
    grade-school arithmetic, whose answers end in the result. Source: GSM8K (arXiv 2110.14168).
    """

    wants: ClassVar[str] = "a number"
    example: ClassVar[tuple[str, str, float]] = ("3 hens lay 1,042.", "#### 1042", 1.0)

    def score(self, prediction: str, reference: str) -> float:
        """Return 1 where the last numbers are equal, else 0."""
        return float(same_number(prediction, reference))

    def readable(self, prediction: str, reference: str) -> bool:
        """Return whether the prediction states a number."""
        return states_number(prediction)
