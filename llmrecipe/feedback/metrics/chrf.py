"""chrF."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.feedback.metric import Metric


@register
class Chrf(Metric):
    """chrF: 100 (1 + b^2) P R / (b^2 P + R), b = 2, P and R the mean precision and recall of character 1- to 6-grams.

    Of the whole corpus: n-grams are counted over all rows first. White space does not count. Of several
    references of a row the one with the largest score of the row counts. Computed by sacrebleu.

    Paper: Popovic 2015, chrF: character n-gram F-score for automatic MT evaluation.
    """

    library: ClassVar[str] = "sacrebleu"
    bounds: ClassVar[tuple[float, float]] = (0.0, 100.0)
    example: ClassVar[tuple[str, str, float]] = ("ab", "ac", 25.0)

    def score(self, prediction: str, reference: str) -> float:
        """Return the chrF of one row."""
        return self.total(self.statistics(prediction, [reference]))

    def statistics(self, prediction: str, references: Sequence[str]) -> list[float]:
        """Return n-grams of the prediction, of the reference and of both, for each length, (18,)."""
        from sacrebleu.metrics import CHRF

        return [float(v) for v in CHRF()._extract_corpus_statistics([prediction], [[r] for r in references])[0]]

    def total(self, sums: Sequence[float]) -> float:
        """Return the chrF of the added counts."""
        from sacrebleu.metrics import CHRF

        return min(100.0, float(CHRF()._compute_f_score([int(v) for v in sums])))
