"""Macro-F1 of labels that are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.answer_match import normalise
from llmrecipe.core.errors import RunError
from llmrecipe.core.registry import register
from llmrecipe.feedback.metric import Metric

MOST = 1000
"""Labels that are counted at most."""


@register
class LabelF1(Metric):
    """Macro-F1 of written labels: mean over labels of 2 h / (p + g), h hits, p times written, g rows that have the label.

    The labels are the references of all rows (of several the first), compared in lower case without articles, punctuation and
    runs of white space; an answer that is none of them is wrong in its row, and no label of its own. A label with p = g = 0 has
    no part in the mean, as in the rows of one task. That is `f1_score(average="macro", labels=those of the rows)` of
    scikit-learn, the score of MetaICL (arXiv 2110.15943) for classification.
    """

    wants: ClassVar[str] = "one of the labels"
    example: ClassVar[tuple[str, str, float]] = ("Positive.", "positive", 1.0)

    def score(self, prediction: str, reference: str) -> float:
        """Return 1 where the texts are the same label, else 0."""
        return float(_label(prediction) == _label(reference))

    def unread(self, answered: Sequence[tuple[str, Sequence[str]]]) -> list[bool]:
        """Return whether the answer of each row is none of the labels."""
        labels = {_label(one) for _, known in answered for one in known}
        return [_label(prediction) not in labels for prediction, _ in answered]

    def table(self, answered: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Return for each row which label it hits, has and was given, (R, 3 C), C labels.

        Raises:
            RunError: there are more different references than labels could be.
        """
        gold = [_label(known[0]) for _, known in answered]
        places = {label: place for place, label in enumerate(dict.fromkeys(gold))}
        if len(places) > MOST:
            raise RunError(
                f"eval.metrics: label_f1 counts {MOST:,} labels at most, and the references are {len(places):,} texts"
            )
        rows = []
        for own, (prediction, known) in zip(gold, answered, strict=True):
            row = [0.0] * (3 * len(places))
            written = own if _label(prediction) in map(_label, known) else _label(prediction)
            if written in places:
                row[len(places) + places[written]] = 1.0
                row[places[own]] = float(written == own)
            row[2 * len(places) + places[own]] = 1.0
            rows.append(row)
        return rows

    def total(self, sums: Sequence[float]) -> float:
        """Return the mean over the labels that a row has or was given; 0 where there are none."""
        count = len(sums) // 3
        parts = zip(sums[:count], sums[count : 2 * count], sums[2 * count :], strict=True)
        found = [2.0 * hits / (written + there) for hits, written, there in parts if written + there]
        return sum(found) / len(found) if found else 0.0


def _label(text: str) -> str:
    return normalise(text, True, True, True)
