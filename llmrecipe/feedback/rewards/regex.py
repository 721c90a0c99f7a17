"""A pattern as a reward."""

from __future__ import annotations

from collections.abc import Sequence

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Literal
from llmrecipe.core.registry import register
from llmrecipe.core.time_limit import compiled, within
from llmrecipe.objectives.reward_interface import Answer, Reward


@register
class Regex(Reward):
    """`found` where a regular expression matches the answer, `missing` elsewhere; a dot matches line ends too.

    A pattern that takes longer than five seconds on one answer is an error.

    Its mean is the share of answers that match. With the phrases by which a model declines, that is its refusal rate: in an
    `eval` stage `reward: {refusals: {kind: regex, pattern: ["I (cannot|can't)", "as an AI"], ignore_case: true}}`.
    """

    pattern: str | list[str] = ""
    """The regular expression, or several of which one has to match."""
    ignore_case: bool = False
    """Whether upper and lower case are the same."""
    where: Literal["anywhere", "whole"] = "anywhere"
    """Whether it may match a part of the answer or must match all of it."""
    found: float = 1.0
    """Score of a match; negative to punish a phrase."""
    missing: float = 0.0
    """Score of an answer without a match."""

    def check(self, columns: Sequence[str], where: str) -> None:
        """Refuse missing and invalid patterns."""
        if not self.pattern or not all(self.patterns):
            raise RecipeError(f"{where}.pattern: must be given, such as '^Answer: \\d+$'")
        for number, pattern in enumerate(self.patterns):
            compiled(pattern, f"{where}.pattern" + (f".{number}" if isinstance(self.pattern, list) else ""))

    @property
    def patterns(self) -> list[str]:
        """Return every pattern."""
        return self.pattern if isinstance(self.pattern, list) else [self.pattern]

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """Return `found` or `missing` for each answer."""
        known = [compiled(pattern, "pattern", self.ignore_case, dot_all=True) for pattern in self.patterns]
        matches = [p.fullmatch if self.where == "whole" else p.search for p in known]
        return [self.found if any(within(m, a.text, "regex.pattern") for m in matches) else self.missing for a in answers]
