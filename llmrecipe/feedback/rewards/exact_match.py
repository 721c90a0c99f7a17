"""The right answer as a reward."""

from __future__ import annotations

import json
from collections.abc import Sequence

from llmrecipe.core.option_types import Literal
from llmrecipe.core.registry import register
from llmrecipe.core.time_limit import compiled, matches
from llmrecipe.feedback.numbers import same_number
from llmrecipe.objectives.reward_interface import Answer, Reward


def _written(value: object) -> str:
    """Return a cell as it stands in a file: lists and truth values as JSON, a whole number without the `.0` of a table."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value, ensure_ascii=False, default=str)


@register
class ExactMatch(Reward):
    """1 where the answer equals the row's column, else 0: the trimmed text, its last number, or what a pattern finds in it.

    Numbers are read as in `llmrecipe.feedback.numbers`: signs, separators, fractions, units and LaTeX.
    """

    column: str = "answer"
    """Column of the prompt rows with the right answer."""
    compare: Literal["text", "last_number"] = "text"
    """Whole texts, or the last number of each, as numbers."""
    extract: str | None = None
    """Regular expression; of the last match its first group that matched (or all of it) is compared, not the whole answer."""
    ignore_case: bool = False
    """Compare in lower case."""

    def needs(self) -> list[str]:
        """Name the column of the right answer."""
        return [self.column]

    def check(self, columns: Sequence[str], where: str) -> None:
        """Refuse an invalid pattern."""
        if self.extract is not None:
            compiled(self.extract, f"{where}.extract")

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """Return 1 for each right answer, else 0."""
        return [float(self._right(a.text, _written(a.columns[self.column]))) for a in answers]

    def _right(self, text: str, wanted: str) -> bool:
        if self.extract is not None:
            found = matches(compiled(self.extract, "extract"), text, "exact_match.extract")
            if not found:
                return False
            groups = found[-1].groups()
            text = next((group for group in groups if group is not None), "") if groups else found[-1].group()
        if self.compare == "last_number":
            return same_number(text, wanted)
        one_text, other_text = text.strip(), wanted.strip()
        return one_text.lower() == other_text.lower() if self.ignore_case else one_text == other_text
