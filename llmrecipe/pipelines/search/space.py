"""The space of a search: points of a grid, Optuna's distributions, and the words that set a point."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import RecipeError
from llmrecipe.recipe.compose import Composition, compose
from llmrecipe.recipe.overrides import as_word
from llmrecipe.recipe.schema import Recipe
from llmrecipe.recipe.search_section import RangeSection, SearchSection

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

STEPS = {"grid": "a grid", "stepwise": "a stepwise search"}

MOST = 100_000
"""Points of the largest grid."""


def point_words(point: Mapping[str, Any]) -> list[str]:
    """Return the overrides that set a point, without options of methods that are not in the stack it chooses."""
    chosen = point.get("stack")
    return [as_word(tuple(key.split(".")), value) for key, value in point.items() if chosen is None or applies(key, chosen)]


def scaled_rate(section: SearchSection, recipe: Recipe, size: int) -> list[str]:
    """Return the override that scales a trial's learning rate with its batch size, if one is wanted.

    A batch of b rows averages b gradients. With plain gradient descent steps may grow like b (Goyal et al. 2017, Accurate,
    Large Minibatch SGD, arXiv 1706.02677); with Adam, which divides by the size of the gradient, like the square root of b
    (Malladi et al. 2022, On the SDEs and Scaling Rules for Adaptive Gradient Algorithms, arXiv 2205.10287).

    Args:
        recipe: of the trial, with its learning rate as the space has it.
        size: b0, the batch size for which the space's learning rates are meant.
    """
    if section.lr_scaling == "off" or recipe.batch.size == size:
        return []
    power = {"sqrt": 0.5, "linear": 1.0}[section.lr_scaling]
    scaled = float(recipe.optim["lr"]) * (recipe.batch.size / size) ** power
    return [as_word(("optim", "lr"), float(f"{scaled:.6g}"))]


def applies(key: str, stack: Sequence[str]) -> bool:
    """Return whether a key means something under a chosen list of methods."""
    section, _, rest = key.partition(".")
    return section != "stack" or not rest or rest.partition(".")[0] in stack


def check_space(recipe: str, words: list[str], section: SearchSection) -> None:
    """Compose the recipe with every choice and both ends of every range.

    Raises:
        RecipeError: every value that no recipe can have, each under its key of the space.
    """
    if not section.space:
        raise RecipeError("search.space: names nothing to try; write {optim.lr: {low: 1e-5, high: 1e-3, log: true}}")
    mistakes = []
    if section.sampler in ("grid", "stepwise"):
        mistakes += [
            f"search.space.{key}: {STEPS[section.sampler]} needs a list of values or a range with a step"
            for key, value in section.space.items()
            if isinstance(value, RangeSection) and value.step is None
        ]
    for key, value in section.space.items():
        if not choices_of(value):
            mistakes.append(f"search.space.{key}: the list of values is empty")
            continue
        base = {key: first(value) for key, value in section.space.items()}
        stacks = choices_of(section.space.get("stack", []))
        if stacks:
            having = [stack for stack in stacks if applies(key, stack)]
            if not having:
                mistakes.append(f"search.space.{key}: no list of methods of search.space.stack has it")
                continue
            base["stack"] = having[0]
        for choice in choices_of(value):
            try:
                compose(recipe, [*words, *point_words({**base, key: choice})])
            except RecipeError as error:
                mistakes += [f"search.space.{key}: {choice!r}: {line}" for line in str(error).split("\n")]
    mistakes += _other_keys(section)
    if mistakes:
        raise RecipeError("\n".join(dict.fromkeys(mistakes)))


def _other_keys(section: SearchSection) -> list[str]:
    """Return what is wrong with `start`, `limits`, `lr_scaling` and `pick`."""
    found = []
    if section.start and section.sampler in ("grid", "stepwise"):
        found.append(f"search.start: {section.sampler} says itself what is tried; leave it out, or take another sampler")
    for number, point in enumerate(section.start):
        where = f"search.start.{number}"
        if set(point) != set(section.space):
            found.append(
                f"{where}: must give every key of search.space, {', '.join(section.space)}; it gives {', '.join(point)}"
            )
            continue
        for key, value in section.space.items():
            inside = point[key] in value if isinstance(value, list) else value.low <= point[key] <= value.high
            if not inside:
                found.append(f"{where}.{key}: {point[key]!r} is not in search.space.{key}")
    found += [
        f"search.limits.{cost}: it is measured where search.against names it; add it there"
        for cost in section.limits
        if cost not in section.against
    ]
    if section.lr_scaling != "off" and "batch.size" not in section.space:
        found.append(
            "search.lr_scaling: all trials have the same batch size, so nothing is scaled; add batch.size to search.space"
        )
    if section.pick == "knee" and not section.against:
        found.append("search.pick: a knee is where score bends over a cost; name one in search.against, or use pick: best")
    return found


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
    axes = axes_values(section)
    size = math.prod(len(values) for values in axes.values())
    if size > MOST:
        raise RecipeError(f"search.space: the grid has {size} points; at most {MOST} are tried")
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def axes_values(section: SearchSection) -> dict[str, list[Any]]:
    """Return every value of each key."""
    return {key: _values(value) for key, value in section.space.items()}


def _values(value: list[Any] | RangeSection) -> list[Any]:
    if not isinstance(value, RangeSection):
        return list(value)
    step = value.step or 1
    count = math.floor((value.high - value.low) / step + 1e-9) + 1
    if count > MOST:
        raise RecipeError(f"search.space: a range has {count:,} values; at most {MOST:,} are tried, so give a larger step")
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
            found[key] = rounded(chosen, value)
        else:
            found[key] = chosen
    return found


def rounded(number: float, value: RangeSection) -> float:
    """Round a number of a range to six digits, inside the range."""
    return min(max(float(f"{number:.6g}"), value.low), value.high)


def drawn_of(section: SearchSection, point: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the recipe's values to what Optuna samples: numbers of choices, values of ranges."""
    return {key: v.index(point[key]) if isinstance(v, list) else point[key] for key, v in section.space.items()}


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
