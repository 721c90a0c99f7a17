"""The interface of a text metric: how good a generated answer is against its reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass as pydantic_dataclass

from llmrecipe.core.registry import CONFIG

INVALID = "invalid_rate"
"""Name, after that of a metric, of the share of answers that it could not read."""


@pydantic_dataclass(config=CONFIG, kw_only=True)
class Metric:
    """A score of one answer, in [0, 1] where nothing else is said; an evaluation reports the mean over rows.

    A row may have several references, each of which is a right answer: its score is then the best over them.
    """

    group: ClassVar[str] = "metric"
    direction: ClassVar[Literal["min", "max"]] = "max"
    """Whether a small (an error rate) or a large mean is better."""
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    """Least and largest score; the better end is that of an answer equal to its reference."""
    wants: ClassVar[str] = ""
    """What an answer has to state for the metric to read it (a number, JSON); empty where it reads every text."""
    library: ClassVar[str] = ""
    """Optional library that computes it (the extra `metrics`)."""
    example: ClassVar[tuple[str, str, float]]
    """A prediction, a reference and the score by hand."""

    def score(self, prediction: str, reference: str) -> float:
        """Score a prediction against its reference."""
        raise NotImplementedError

    def best(self, prediction: str, references: Sequence[str]) -> float:
        """Return the best of the scores against each reference, of which there is at least one."""
        pick = max if self.direction == "max" else min
        return pick(self.score(prediction, reference) for reference in references)

    def readable(self, prediction: str, reference: str) -> bool:
        """Return whether an answer states what the metric wants; `NAME/invalid_rate` is the share of answers that do not.

        An unreadable answer also counts in the score, as a wrong one.
        """
        return True

    def reads(self, prediction: str, references: Sequence[str]) -> bool:
        """Return whether an answer states what the metric wants to compare with one of the references at least."""
        return any(self.readable(prediction, reference) for reference in references)

    def unread(self, answered: Sequence[tuple[str, Sequence[str]]]) -> list[bool] | None:
        """Return whether the answer of each row could not be read; None where every text is."""
        return [not self.reads(prediction, references) for prediction, references in answered] if self.wants else None

    def unfit(self, references: Sequence[str]) -> str | None:
        """Return why scores against these references mean little, as a warning; None where nothing speaks against them."""
        return None

    def statistics(self, prediction: str, references: Sequence[str]) -> list[float]:
        """Return the numbers of one row, (K,), whose sums over rows `total` reads: its best score and 1 for a mean over rows.

        A score of a whole corpus (BLEU) has its own: what it counts.

        Args:
            references: the right answers of the row, at least one.
        """
        return [self.best(prediction, references), 1.0]

    def table(self, answered: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Return the statistics of every row, (R, K); a score whose statistics depend on the other rows has its own.

        Args:
            answered: prediction and references of each row.
        """
        return [self.statistics(prediction, references) for prediction, references in answered]

    def total(self, sums: Sequence[float]) -> float:
        """Return the score of several rows from the sums of their statistics, (K,); 0 where there are none."""
        return sums[0] / sums[1] if sums[1] else 0.0
