"""Length as a reward."""

from __future__ import annotations

from collections.abc import Sequence

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Literal, NonNegativeInt, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.objectives.reward_interface import Answer, Reward


@register
class Length(Reward):
    """0 for lengths between `least` and `most`; outside, minus the excess as a share of `slack`, never below -1.

    With `slack` tokens of overlength the punishment is full, as in DAPO's soft overlong punishment (arXiv 2503.14476).
    """

    least: NonNegativeInt = 0
    """Shortest length without punishment."""
    most: PositiveInt | None = None
    """Longest length without punishment; null for any."""
    slack: PositiveInt = 16
    """Excess at which the punishment is -1."""
    unit: Literal["tokens", "words", "characters"] = "tokens"
    """What is counted; tokens include the end token."""

    def check(self, columns: Sequence[str], where: str) -> None:
        """Refuse bounds in the wrong order, and no bounds at all."""
        if self.most is None and self.least == 0:
            raise RecipeError(f"{where}: no bound is given; set {where}.most, {where}.least or both")
        if self.most is not None and self.most < self.least:
            raise RecipeError(f"{where}.most: must be >= least; got {self.most} < {self.least}")

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """Return the penalties, in [-1, 0]."""
        return [-min(1.0, self._excess(self._length(a)) / self.slack) for a in answers]

    def _length(self, answer: Answer) -> int:
        if self.unit == "tokens":
            return len(answer.ids)
        return len(answer.text.split()) if self.unit == "words" else len(answer.text)

    def _excess(self, length: int) -> int:
        over = 0 if self.most is None else max(0, length - self.most)
        return max(over, self.least - length, 0)
