"""Last number."""

from __future__ import annotations

import re
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.feedback.metric import Metric

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@register
class LastNumber(Metric):
    """Last number: 1 when the last number of the prediction equals the last number of the reference, else 0.

    The usual check of grade-school arithmetic, whose answers end in the result. Source: GSM8K (arXiv 2110.14168).
    """

    example: ClassVar[tuple[str, str, float]] = ("3 hens lay 1,042.", "#### 1042", 1.0)

    def score(self, prediction: str, reference: str) -> float:
        """Return 1 where the last numbers are equal, else 0."""
        ours, theirs = NUMBER.findall(prediction), NUMBER.findall(reference)
        if not ours or not theirs:
            return 0.0
        return float(float(ours[-1].replace(",", "")) == float(theirs[-1].replace(",", "")))
