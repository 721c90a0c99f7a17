"""A pattern as a reward."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmrecipe.errors import RecipeError
from llmrecipe.fields import Literal
from llmrecipe.registry import register
from llmrecipe.rewards.exact_match import compiled
from llmrecipe.rewards.reward import Answer, Reward


@register
class Regex(Reward):
    """`found` where a regular expression matches the answer, `missing` elsewhere; a dot matches line ends too."""

    pattern: str = ""
    """The regular expression."""
    where: Literal["anywhere", "whole"] = "anywhere"
    """Whether it may match a part of the answer or must match all of it."""
    found: float = 1.0
    """Score of a match; negative to punish a phrase."""
    missing: float = 0.0
    """Score of an answer without a match."""

    def check(self, columns: Sequence[str], where: str) -> None:
        """The pattern must be there and be one."""
        if not self.pattern:
            raise RecipeError(f"{where}.pattern: must be given, such as '^Answer: \\d+$'")
        compiled(self.pattern, f"{where}.pattern")

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """`found` or `missing`."""
        pattern = re.compile(self.pattern, re.DOTALL)
        match = pattern.fullmatch if self.where == "whole" else pattern.search
        return [self.found if match(a.text) else self.missing for a in answers]
