"""BLEU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.feedback.metric import Metric


@register
class Bleu(Metric):
    """BLEU: 100 min(1, e^(1 - r/c)) exp(1/4 sum_n log p_n), p_n the share of n-grams found in the reference, by sacrebleu.

    Of the whole corpus: matches and lengths c (predictions) and r (references) are added up over rows first, so it is no mean
    of the rows' scores. Tokenisation 13a, exponential smoothing where no n-gram of a length matches. Of several references of
    a row an n-gram counts as often as in the one that has it most often, and r is the length that is nearest to c.

    Papers: Papineni et al. 2002; A Call for Clarity in Reporting BLEU Scores (arXiv 1804.08771).
    """

    library: ClassVar[str] = "sacrebleu"
    bounds: ClassVar[tuple[float, float]] = (0.0, 100.0)
    example: ClassVar[tuple[str, str, float]] = (
        "the red hen sat in the barn",
        "the red hen sat in the barn today",
        100 * 0.8668778997501817,
    )

    def score(self, prediction: str, reference: str) -> float:
        """Return the BLEU of one row."""
        return self.total(self.statistics(prediction, [reference]))

    def statistics(self, prediction: str, references: Sequence[str]) -> list[float]:
        """Return both lengths, then matches and n-grams of each length, (10,)."""
        from sacrebleu.metrics import BLEU

        found = BLEU().corpus_score([prediction], [[reference] for reference in references])
        return [float(v) for v in (found.sys_len, found.ref_len, *found.counts, *found.totals)]

    def total(self, sums: Sequence[float]) -> float:
        """Return the BLEU of the added counts."""
        from sacrebleu.metrics import BLEU

        counts, totals = [[int(v) for v in part] for part in (sums[2:6], sums[6:10])]
        found = BLEU.compute_bleu(counts, totals, int(sums[0]), int(sums[1]), smooth_method="exp")
        return min(100.0, float(found.score))
