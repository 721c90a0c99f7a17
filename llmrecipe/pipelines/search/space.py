"""The space of a search: points of a grid, Optuna's distributions, and the words that set a point."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import RecipeError
from llmrecipe.recipe.compose import Composition, compose
from llmrecipe.recipe.overrides import as_word
from llmrecipe.recipe.schema import RangeSection, SearchSection

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

MOST = 100_000
"""Points of the largest grid."""


def point_words(point: Mapping[str, Any]) -> list[str]:
    """Return the overrides that set a point."""
    return [as_word(tuple(key.split(".")), value) for key, value in point.items()]


def check_space(recipe: str, words: list[str], section: SearchSection) -> None:
    """Compose the recipe with every choice and both ends of every range.

    Raises:
        RecipeError: every value that no recipe can have, each under its key of the space.
    """
    if not section.space:
        raise RecipeError("search.space: names nothing to try; write {optim.lr: {low: 1e-5, high: 1e-3, log: true}}")
    mistakes = []
    if section.sampler == "grid":
        mistakes += [
            f"search.space.{key}: a grid needs a list of values or a range with a step"
            for key, value in section.space.items()
            if isinstance(value, RangeSection) and value.step is None
        ]
    base = {key: first(value) for key, value in section.space.items()}
    for key, value in section.space.items():
        if not choices_of(value):
            mistakes.append(f"search.space.{key}: the list of values is empty")
            continue
        for choice in choices_of(value):
            try:
                compose(recipe, [*words, *point_words({**base, key: choice})])
            except RecipeError as error:
                mistakes += [f"search.space.{key}: {choice!r}: {line}" for line in str(error).split("\n")]
    if mistakes:
        raise RecipeError("\n".join(dict.fromkeys(mistakes)))


def choices_of(value: list[Any] | RangeSection) -> list[Any]:
    """Return every choice of a list, or both ends of a range."""
    return [value.low, value.high] if isinstance(value, RangeSection) else list(value)


def first(value: list[Any] | RangeSection) -> object:
    """Return the first value of a list or range."""
    return next(iter(choices_of(value)), None)


def grid_points(section: SearchSection) -> list[dict[str, Any]]:
    """List every point, the last key varying fastest.

    Raises:
        RecipeError: there are too many.
    """
    axes = {key: _values(value) for key, value in section.space.items()}
    size = math.prod(len(values) for values in axes.values())
    if size > MOST:
        raise RecipeError(f"search.space: the grid has {size} points; at most {MOST} are tried")
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def _values(value: list[Any] | RangeSection) -> list[Any]:
    if not isinstance(value, RangeSection):
        return list(value)
    step = value.step or 1
    count = math.floor((value.high - value.low) / step + 1e-9) + 1
    return [value.low + k * step for k in range(count)]


def distributions(section: SearchSection) -> dict[str, BaseDistribution]:
    """Convert the space to Optuna's distributions. Choices are numbered, so that a value may be any JSON."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for key, value in section.space.items():
        if not isinstance(value, RangeSection):
            found[key] = CategoricalDistribution(tuple(range(len(value))))
        elif isinstance(value.low, int) and isinstance(value.high, int) and not isinstance(value.step, float):
            found[key] = IntDistribution(value.low, value.high, log=value.log, step=value.step or 1)
        else:
            found[key] = FloatDistribution(value.low, value.high, log=value.log, step=value.step)
    return found


def point_of(section: SearchSection, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Convert what Optuna sampled to the recipe's values; numbers are rounded to six digits, which every recipe can show."""
    found = {}
    for key, value in section.space.items():
        chosen = drawn[key]
        if not isinstance(value, RangeSection):
            found[key] = value[chosen]
        elif isinstance(chosen, float):
            found[key] = min(max(float(f"{chosen:.6g}"), value.low), value.high)
        else:
            found[key] = chosen
    return found


def axes_of(composition: Composition) -> SearchSection:
    """Return the search section of a recipe.

    Raises:
        RecipeError: it has none.
    """
    if composition.recipe.search is None:
        raise RecipeError(
            f"search: {composition.name} says nothing to try; add it to the recipe, or on the command line: "
            "'search.space={optim.lr: [1e-4, 3e-4, 1e-3]}' search.sampler=grid"
        )
    if composition.recipe.stages:
        raise RecipeError("search: a pipeline cannot be searched; search the recipe of one of its stages")
    return composition.recipe.search
