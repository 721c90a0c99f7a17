"""The right answer as a reward."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Literal
from llmrecipe.core.registry import register
from llmrecipe.objectives.reward_interface import Answer, Reward

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@register
class ExactMatch(Reward):
    """1 where the answer equals the row's column, else 0: the trimmed text, its last number, or what a pattern finds in it."""

    column: str = "answer"
    """Column of the prompt rows with the right answer."""
    compare: Literal["text", "last_number"] = "text"
    """Whole texts, or the last number of each, as numbers."""
    extract: str | None = None
    """Regular expression; its first group (or whole match), the last one found, is compared instead of the whole answer."""
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
        return [float(self._right(a.text, str(a.columns[self.column]))) for a in answers]

    def _right(self, text: str, wanted: str) -> bool:
        if self.extract is not None:
            found = list(re.finditer(self.extract, text))
            if not found:
                return False
            text = found[-1].group(1 if found[-1].re.groups else 0) or ""
        if self.compare == "last_number":
            one, other = extract_number(text), extract_number(wanted)
            return one is not None and one == other
        one_text, other_text = text.strip(), wanted.strip()
        return one_text.lower() == other_text.lower() if self.ignore_case else one_text == other_text


def extract_number(text: str) -> float | None:
    """Return the last number of a text, without thousands separators; None where there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """Compile a regular expression.

    Raises:
        RecipeError: it is not one.
    """
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise RecipeError(f"{where}: not a regular expression: {error}; got {pattern!r}") from error
