"""ROUGE-L."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.feedback.metric import Metric

WORD = re.compile(r"[a-z0-9]+")
UNREAD = 0.1
"""Largest share of letters and digits outside a-z and 0-9 without a warning."""


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """Return the length of the longest common subsequence of two word lists."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def unread_script(references: Sequence[str]) -> str | None:
    """Return a warning where more than a tenth of the letters and digits of references are outside a-z and 0-9, else None."""
    signs = [sign for text in references for sign in text.lower() if sign.isalnum()]
    unread = sum(WORD.fullmatch(sign) is None for sign in signs)
    if unread <= UNREAD * len(signs):
        return None
    return (
        f"{unread / len(signs):.0%} of the letters and digits of the references are outside a-z and 0-9 and do not count; "
        "chrf reads every script"
    )


@register
class RougeL(Metric):
    """ROUGE-L: F = 2 P R / (P + R) with P = lcs / |prediction|, R = lcs / |reference|; 0 where either is empty.

    Words are runs of lower-cased a-z and 0-9, without stemming, so text in other scripts scores 0; a warning says so. Source:
    Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries.
    """

    example: ClassVar[tuple[str, str, float]] = ("the red hen sat", "the hen sat down", 0.75)

    def score(self, prediction: str, reference: str) -> float:
        """Compute the F measure of the longest common subsequence."""
        ours, theirs = WORD.findall(prediction.lower()), WORD.findall(reference.lower())
        common = longest_common_subsequence(ours, theirs)
        return 2.0 * common / (len(ours) + len(theirs)) if common else 0.0

    def unfit(self, references: Sequence[str]) -> str | None:
        """Warn where more than a tenth of the letters and digits are outside a-z and 0-9."""
        return unread_script(references)
