"""Axes of `matrix` that take their values from the registry, so that a leaderboard holds every method there is.

    method:
      matrix: {method: {sft: {}, adapter: {optim: {lr: 3e-3}}}, seed: [0]}
      registered: {method: {stack: [additive, selective], except: [coda]}}

adds to the axis `method` the recipe of every registered method of these families that the axis does not contain yet; the keys
of existing values stay. The recipe of a method is called as the method, or sft_METHOD; that of an objective OBJECTIVE_lora, or
as the objective. A component without one is left out. The values are filled in before the overrides of the command line are
read, so `~stages.method.matrix.method.adapter` drops one, and a stored recipe keeps the methods it was composed with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.recipe.provenance import Origin, Origins, forget, origin_of
from llmrecipe.recipe.recipe_paths import all_recipes
from llmrecipe.recipe.yaml_file import KeyPath, dotted

RECIPES = {"stack": ("{}", "sft_{}"), "objective": ("{}_lora", "{}")}
"""Group -> names a component's recipe may have, in the order they are looked for."""


def fill(mapping: dict[str, Any], origins: Origins) -> None:
    """Replace every `registered` of a stage by the values it stands for.

    Raises:
        RecipeError: its form is wrong, or a family or component it names is not there.
    """
    stages = mapping.get("stages")
    for name, body in (stages if isinstance(stages, dict) else {}).items():
        if not isinstance(body, dict) or "registered" not in body:
            continue
        at: KeyPath = ("stages", str(name), "registered")
        origin = origin_of(origins, at)
        requested = body.pop("registered")
        forget(origins, at)
        matrix = body.get("matrix")
        for axis, source in requested.items() if isinstance(requested, Mapping) else [("", None)]:
            values = matrix.get(axis) if isinstance(matrix, dict) else None
            if not isinstance(values, dict) or not isinstance(source, Mapping):
                example = "{method: {stack: [additive], except: [coda]}} next to an axis `method: {...}` of `matrix`"
                raise _wrong(at, f"must be a mapping such as {example}; got {requested!r}", origin)
            for recipe in _missing(source, list(values), (*at, str(axis)), origin):
                values[recipe] = {}
                if origin is not None:
                    origins[("stages", str(name), "matrix", str(axis), recipe)] = origin


def _missing(source: Mapping[str, Any], values: list[str], at: KeyPath, origin: Origin | None) -> list[str]:
    """Recipes of the components that a source names and an axis does not hold."""
    left_out = source.get("except") or []
    found: list[str] = []
    for group, families in source.items():
        if group == "except":
            continue
        if group not in RECIPES:
            raise _wrong(
                (*at, group), f"names no group{did_you_mean(str(group), RECIPES)}; it is {' or '.join(RECIPES)}", origin
            )
        specs = [registry.spec(group, name) for name in registry.names(group)]
        for given, known in ((families, {s.family for s in specs}), (left_out, {s.name for s in specs})):
            if not isinstance(given, list):
                raise _wrong(at, f"must hold lists of names; got {given!r}", origin)
            for word in given:
                if word not in known:
                    near = did_you_mean(str(word), known)
                    raise _wrong(at, f"there is no '{word}' in {group}{near} (known: {', '.join(sorted(known))})", origin)
        for spec in specs:
            names = [pattern.format(spec.name) for pattern in RECIPES[group]]
            recipe = next((n for n in names if n in all_recipes()), None)
            if spec.family in families and spec.name not in left_out and recipe and not set(names) & {*values, *found}:
                found.append(recipe)
    return found


def _wrong(at: KeyPath, text: str, origin: Origin | None) -> RecipeError:
    return RecipeError(f"{dotted(at)}: {text}{f' [{origin}]' if origin else ''}")
