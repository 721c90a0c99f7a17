"""ROUGE-Lsum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.feedback.metric import Metric
from llmrecipe.feedback.metrics.rouge_l import unread_script


@register
class RougeLsum(Metric):
    """ROUGE-Lsum: F = 2 P R / (P + R) of the words that the lines of the prediction share with those of the reference.

    Lines are sentences. Of a reference's line count the words that are in a longest common subsequence with any line of the
    prediction, each word at most as often as the prediction has it; P is their number over the words of the prediction, R over
    those of the reference. On single lines it is `rouge_l`, whose words it reads, too. Computed by rouge-score.

    Source: Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries, section 3.2.
    """

    library: ClassVar[str] = "rouge_score"
    example: ClassVar[tuple[str, str, float]] = ("the hen sat\nthe owl slept", "the owl slept\nthe hen sat down", 12 / 13)

    def score(self, prediction: str, reference: str) -> float:
        """Compute the F measure over lines."""
        from rouge_score.rouge_scorer import RougeScorer

        return float(RougeScorer(["rougeLsum"]).score(reference, prediction)["rougeLsum"].fmeasure)

    def unfit(self, references: Sequence[str]) -> str | None:
        """Warn where more than a tenth of the letters and digits are outside a-z and 0-9."""
        return unread_script(references)
