"""A Python function as a reward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.core.registry import register
from llmrecipe.objectives.reward_interface import Answer, Reward

FUNCTIONS: dict[str, Callable[..., Any]] = {}

GIVEN = ("prompt", "answer")
"""What a function may ask for by name besides the row's columns."""

F = TypeVar("F", bound=Callable[..., Any])


def reward_function(function: F) -> F:
    """Register a function as a reward under its name.

    It is called once per answer with the answer's text, and by name with its other arguments: `prompt`, `answer` (the
    whole `Answer`) or a column of the row. It returns a number, or None for no opinion; an answer of which no
    reward has an opinion is left out of the step. A parameter with a default takes rows without its column too.
    Packages named in `plugins` are searched for such functions.
    """
    FUNCTIONS[function.__name__] = function
    return function


@register
class Function(Reward):
    """A function marked with `@reward_function`, in this process or in a package of `plugins`."""

    function: str = ""
    """Its name."""

    def needs(self) -> list[str]:
        """Name the columns the function takes without a default."""
        function = functions().get(self.function)
        return [] if function is None else [name for name, needed in wanted(function).items() if needed and name not in GIVEN]

    def check(self, columns: Sequence[str], where: str) -> None:
        """Refuse a function that does not exist."""
        known = functions()
        if self.function not in known:
            hint = did_you_mean(self.function, known) if self.function else ""
            names = ", ".join(sorted(known)) or "none"
            raise RecipeError(
                f"{where}.function: no reward function is called '{self.function}'{hint} (known: {names}); mark one "
                "with @reward_function of llmrecipe.plugin in a package and name that package: plugins=[PACKAGE]"
            )

    def score(self, answers: Sequence[Answer]) -> list[Any]:
        """Return what the function returns for each answer."""
        function = functions()[self.function]
        names = wanted(function)
        scores = []
        for a in answers:
            given = {**a.columns, "prompt": a.prompt, "answer": a}
            scores.append(function(a.text, **{n: given[n] for n, needed in names.items() if needed or n in given}))
        return scores


def functions() -> dict[str, Callable[..., Any]]:
    """Return every registered function, those of plugins included."""
    registry.import_marked("@reward_function")
    return FUNCTIONS


def wanted(function: Callable[..., Any]) -> dict[str, bool]:
    """Return the arguments of a function besides the text -> whether it must be given."""
    named = list(inspect.signature(function).parameters.values())[1:]
    return {p.name: p.default is p.empty for p in named if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
