"""A rule of the embedded world as a reward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.core.option_types import ClassVar
from llmrecipe.core.registry import register
from llmrecipe.objectives.reward_interface import Answer, Reward


@register
class Rule(Reward):
    """A named check of `llmrecipe.data.toy.scorers`; what it needs besides the answer comes from the row's columns."""

    builtin_rows_only: ClassVar[bool] = True

    rule: str = "manners"
    """Which rule: manners, polite, on_topic, well_formed, exact, last_number, rude."""

    def needs(self) -> list[str]:
        """Name what the rule needs besides the answer."""
        known = _rules()
        return _arguments(known[self.rule]) if self.rule in known else []

    def check(self, columns: Sequence[str], where: str) -> None:
        """Refuse a rule that does not exist."""
        known = _rules()
        if self.rule not in known:
            near = did_you_mean(self.rule, known)
            raise RecipeError(f"{where}.rule: there is no rule '{self.rule}'{near} (known: {', '.join(sorted(known))})")

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """Return the rule's scores, in [0, 1]."""
        rule = _rules()[self.rule]
        names = _arguments(rule)
        return [rule(answer.text, *(answer.columns[name] for name in names)) for answer in answers]


def _rules() -> dict[str, Callable[..., float]]:
    from llmrecipe.data.toy import scorers

    found: dict[str, Callable[..., float]] = {}
    for name, function in inspect.getmembers(scorers, inspect.isfunction):
        parameters = list(inspect.signature(function).parameters)
        if (
            function.__module__ == scorers.__name__
            and parameters[:1] == ["text"]
            and function.__annotations__["return"] == "float"
        ):
            found[name] = function
    return found


def _arguments(rule: Callable[..., float]) -> list[str]:
    return list(inspect.signature(rule).parameters)[1:]
