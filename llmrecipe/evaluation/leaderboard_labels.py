"""Names of the rows of a leaderboard: what sets the recipe of a run apart from those of the others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmrecipe.core import registry
from llmrecipe.runs.run_record import flat, read_run

NOT_A_WAY = ("run", "log", "save", "seed")
"""Recipe keys in which two runs of one row may differ."""
FULL = "full"
"""Name of the row in which every weight was trained."""
FRESH = "fresh"
"""Name of the row of a model that no run made, among rows named by the run they go on from."""
UNSET: tuple[Any, ...] = (None, {})
"""Values that say the same as no value."""
START = "start"
"""Section of keys that are those of the run below, in the name of a row."""


def labels_of(
    recipes: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any] | None] = (), apart_from: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Return (name, family) of each recipe: its stack or, where objectives differ, its objective; `full` for an empty stack.

    Where all share both and they go on from runs of several objectives, that of the run below is the name; `fresh` of a model
    that no run made. Recipes that would share a name though they differ in more than the seed get the differing values
    appended; of those of the run below only as many as tell them apart, its objective's first. What is not set is left out.

    Args:
        starts: the recipe of the run that each goes on from; None where there is none.
        apart_from: keys in which recipes of one name may differ.
    """
    by_start = len({_name(recipe) for recipe in recipes}) == 1 and len({_objective_of(start) for start in starts}) > 1
    by_objective = len({recipe["objective"]["kind"] for recipe in recipes}) > 1
    if by_start:
        names = [(FRESH, FRESH) if start is None else _objective(start) for start in starts]
        ways = [_way(recipe, start) for recipe, start in zip(recipes, starts, strict=True)]
    else:
        names = [_objective(recipe) if by_objective else _stack(recipe) for recipe in recipes]
        ways = [_way(recipe) for recipe in recipes]
    ways = [{key: value for key, value in way.items() if key not in apart_from} for way in ways]
    found = []
    for (name, family), own in zip(names, ways, strict=True):
        others = [way for (other, _), way in zip(names, ways, strict=True) if other == name]
        keys = sorted(k for k in {k for way in others for k in way} if any(way.get(k) != own.get(k) for way in others))
        keys = _telling(keys, others) if by_start else keys
        shown = [f"{k}={own[k]}" for k in keys if own.get(k) not in UNSET]
        found.append((f"{name} ({', '.join(shown)})" if shown else name, family))
    return found


def _telling(keys: Sequence[str], ways: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return keys that tell recipes apart as well as all do, those of the objective below before others."""
    chosen: list[str] = []
    known = 1
    for key in sorted(keys, key=lambda k: not k.startswith(f"{START}.objective.")):
        parts = len({repr([None if way.get(k) in UNSET else way[k] for k in (*chosen, key)]) for way in ways})
        if parts > known:
            chosen, known = [*chosen, key], parts
    return chosen


def _way(recipe: Mapping[str, Any], start: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return key path -> value of a recipe in what sets it apart; the run below by its own recipe rather than by its path."""
    own = _flat(recipe)
    if start is None:
        return own
    below = _flat(start)
    return {k: v for k, v in own.items() if not k.startswith("model.")} | {f"{START}.{k}": v for k, v in below.items()}


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return key path -> value of what decides what is learned; sources with weights are one value."""
    own = {k: v for k, v in recipe.items() if k not in NOT_A_WAY}
    path = (own.get("data") or {}).get("path")
    if isinstance(path, Mapping):
        own["data"] = {**own["data"], "path": " + ".join(f"{weight:g} {source}" for source, weight in path.items())}
    return flat(own)


def _name(recipe: Mapping[str, Any]) -> tuple[str, str]:
    return _objective(recipe)[0], _stack(recipe)[0]


def _objective_of(recipe: Mapping[str, Any] | None) -> str | None:
    return None if recipe is None else str(recipe["objective"]["kind"])


def recipe_below(recipe: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the recipe of the run that a run goes on from; None for any other model."""
    path = str(recipe.get("model", {}).get("path"))
    return read_run(path).recipe if (Path(path) / "recipe.yaml").is_file() else None


def first_model(recipe: Mapping[str, Any]) -> str:
    """Return the model section of the first run of the chain that a run goes on from, as text."""
    below = recipe_below(recipe)
    return json.dumps(recipe.get("model"), sort_keys=True) if below is None else first_model(below)


def _objective(recipe: Mapping[str, Any]) -> tuple[str, str]:
    kind = str(recipe["objective"]["kind"])
    return kind, registry.spec("objective", kind).family


def _stack(recipe: Mapping[str, Any]) -> tuple[str, str]:
    kinds = [str(body["kind"]) for body in (recipe.get("stack") or {}).values()]
    return ("+".join(kinds), registry.spec("stack", kinds[-1]).family) if kinds else (FULL, FULL)


def start_label(path: str) -> str:
    """Return the name of the model that others started from: the objective of a run, the path of anything else."""
    if not (Path(path) / "recipe.yaml").is_file():
        return path
    return _objective(read_run(path).recipe)[0]
