"""A Python function as a reward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.core.registry import register
from llmrecipe.objectives.reward_interface import Answer, Reward, need_column

FUNCTIONS: dict[str, Callable[..., Any]] = {}

F = TypeVar("F", bound=Callable[..., Any])


def reward_function(function: F) -> F:
    """Register a function as a reward under its name.

    It is called once an answer with the answer's text, and by name with whatever else it asks for: `prompt`, `answer` (the
    whole `Answer`) or a column of the row. It returns a number. Packages named in `plugins` are searched for such functions.
    """
    FUNCTIONS[function.__name__] = function
    return function


@register
class Function(Reward):
    """A function marked with `@reward_function`, in this process or in a package of `plugins`."""

    function: str = ""
    """Its name."""

    def check(self, columns: Sequence[str], where: str) -> None:
        """Refuse a function that does not exist, and rows without the columns it takes."""
        known = functions()
        if self.function not in known:
            hint = did_you_mean(self.function, known) if self.function else ""
            names = ", ".join(sorted(known)) or "none"
            raise RecipeError(
                f"{where}.function: no reward function is called '{self.function}'{hint} (known: {names}); mark one "
                "with llmrecipe.feedback.rewards.function.reward_function in a package and name that package: plugins=[PACKAGE]"
            )
        for name in wanted(known[self.function]):
            if name not in ("prompt", "answer"):
                need_column(name, columns, where)

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """Return the function's numbers.

        Raises:
            RecipeError: it returned something else.
        """
        function = functions()[self.function]
        names = wanted(function)
        scores = []
        for a in answers:
            given = {"prompt": a.prompt, "answer": a}
            value = function(a.text, **{n: given[n] if n in given else a.columns[n] for n in names})
            if isinstance(value, bool | int | float) and value == value:
                scores.append(float(value))
                continue
            raise RecipeError(
                f"objective.reward: the function '{self.function}' returned {value!r} for {a.text!r}; it must return a number"
            )
        return scores


def functions() -> dict[str, Callable[..., Any]]:
    """Return every registered function, those of plugins included."""
    registry.import_marked("@reward_function")
    return FUNCTIONS


def wanted(function: Callable[..., Any]) -> list[str]:
    """Return the names of a function's arguments besides the text."""
    return list(inspect.signature(function).parameters)[1:]
