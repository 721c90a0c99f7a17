"""From a composed mapping to the validated `Recipe`, and from that to objects.

Every mistake of a recipe is found in one pass and listed together, in the words of `recipe.mistakes`. Nothing here imports
torch except `instantiate`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError, UserError, did_you_mean
from llmrecipe.recipe import kernel_rules, memory_rules, packing_rules, sharding_rules, trained_tokenizer
from llmrecipe.recipe.mistakes import Mistake, merge_mistakes, report, translate, yaml_text
from llmrecipe.recipe.provenance import Origin, leaves
from llmrecipe.recipe.registered_names import unknown_names
from llmrecipe.recipe.schema import Recipe
from llmrecipe.recipe.stack_rules import Declared, refusals
from llmrecipe.recipe.yaml_file import KeyPath, dotted

SINGLE = ("objective", "optim", "schedule")
"""Groups a recipe has exactly one component of."""
MISSING = "???"
LARGEST = 2**53
"""The least whole number that no option may have."""


@dataclass(frozen=True)
class Parts:
    """The objects a recipe names."""

    objective: Any
    wrappers: list[Any]
    """In the recipe's order; each carries its key of the stack as `name`."""
    optimizer: Any
    schedule: Any


def validate(mapping: Mapping[str, Any], origins: Mapping[KeyPath, Origin] | None = None) -> Recipe:
    """Check a composed mapping.

    Raises:
        RecipeError: every mistake, one line each.
    """
    mistakes = _unset(mapping)
    unset = {m.key for m in mistakes}
    checked = dict(mapping)
    for group in SINGLE:
        body, found = check_component(group, mapping.get(group), (group,), recipe=mapping)
        checked[group] = body
        mistakes += found
    stack = mapping.get("stack", {})
    if isinstance(stack, Mapping):
        checked["stack"] = {}
        for name, entry in stack.items():
            others = [str(n) for n in stack if n != name]
            body, found = check_component("stack", entry, ("stack", str(name)), others, mapping)
            checked["stack"][name] = body
            mistakes += found
        mistakes += check_stack(stack)
    endless = nonfinite_values({key: value for key, value in mapping.items() if key not in (*SINGLE, "stack")})
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate_json(_json(checked))
    except ValidationError as error:
        mistakes += merge_mistakes(endless, translate(error, mapping, Recipe, (), recipe=mapping))
    else:
        mistakes += endless
    mistakes += [Mistake(*found) for found in (unknown_names(recipe) if recipe is not None else ())]
    if recipe is not None and not mistakes:
        rules = (
            trained_tokenizer.mistakes, sharding_rules.sharding_mistakes, packing_rules.packing_mistakes,
            memory_rules.memory_mistakes, kernel_rules.kernel_mistakes,
        )  # fmt: skip
        mistakes += [Mistake(*found) for rule in rules for found in rule(recipe)]
    mistakes = [m for m in mistakes if m.key not in unset or m.text.endswith("KEY=VALUE")] if unset else mistakes
    if mistakes or recipe is None:
        raise RecipeError(report(mistakes, origins or {}))
    return trained_tokenizer.bind(recipe)


def build_component(group: str, body: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the validated options of one component (`kind` included), without importing it.

    Raises:
        RecipeError: every mistake in it, one line each.
    """
    checked, mistakes = check_component(group, body, tuple(where.split(".")))
    if mistakes:
        raise RecipeError(report(mistakes, {}))
    return checked


def check_component(
    group: str, body: object, at: KeyPath, others: Sequence[str] = (), recipe: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], list[Mistake]]:
    """Return the options of a component with defaults filled in, and what is wrong with them.

    Args:
        others: names of the other entries of the stack.
        recipe: what the component is part of, for hints.
    """
    if not isinstance(body, Mapping):
        return {}, [Mistake(at, f"must be a mapping with a kind, such as {{kind: {_example(group)}}}; got {yaml_text(body)}")]
    kind = body.get("kind")
    if kind is None:
        return dict(body), [Mistake(at, _no_kind(group, at, others))]
    try:
        spec = registry.spec(group, kind if isinstance(kind, str) else str(kind), dotted(at))
    except RecipeError as error:
        return dict(body), [Mistake((*at, "kind"), str(error).removeprefix(f"{dotted(at)}: "))]
    options = {key: value for key, value in body.items() if key != "kind"}
    endless = nonfinite_values(options, at)
    try:
        model = spec.schema_model.model_validate_json(_json(options))
    except ValidationError as error:
        return dict(body), merge_mistakes(endless, translate(error, options, spec.schema_model, at, str(kind), recipe))
    if wrong := [*endless, *(Mistake(*found) for found in unknown_names(model, at))]:
        return dict(body), wrong
    values = json.loads(model.model_dump_json(by_alias=True))
    return {"kind": kind, **{k: options.get(k, v) for k, v in values.items()}}, []


def nonfinite_values(value: object, at: KeyPath = ()) -> list[Mistake]:
    """Return a mistake for every number that no option allows, at any depth, not even a free-form one.

    These are NaN, infinity, and whole numbers of `LARGEST` and more, which libraries cannot hold.
    """
    if isinstance(value, Mapping):
        return [mistake for key, inner in value.items() for mistake in nonfinite_values(inner, (*at, str(key)))]
    if isinstance(value, list | tuple):
        return [mistake for place, inner in enumerate(value) for mistake in nonfinite_values(inner, (*at, place))]
    if isinstance(value, float) and not math.isfinite(value):
        return [Mistake(at, f"must be a finite number; got {yaml_text(value)}")]
    if isinstance(value, int) and abs(value) >= LARGEST:
        return [Mistake(at, f"must be smaller than 2^53 ({LARGEST:,}); got {yaml_text(value)}")]
    return []


def _example(group: str) -> str:
    names = registry.names(group)
    return names[0] if names else "NAME"


def _no_kind(group: str, at: KeyPath, others: Sequence[str]) -> str:
    known = registry.names(group)
    name = str(at[-1])
    if group == "stack":
        if name in known:
            return f"{name} is not in the stack, so it has no options; put it there: stack=[{', '.join([*others, name])}]"
        near = did_you_mean(name, [*others, *known])
        return f"the stack has no '{name}'{near}; a new entry needs a kind: '+stack.{name}={{kind: ...}}'"
    return f"names no {group}; choose one with `- override /{group}: NAME` or {group}=NAME (known: {', '.join(known)})"


def check_stack(stack: Mapping[str, Any]) -> list[Mistake]:
    """Return what the declarations of the kinds forbid: conflicts, missing requirements, two update rules."""
    entries = {str(name): body.get("kind") for name, body in stack.items() if isinstance(body, Mapping)}
    known = [Declared.of_spec(n, registry.spec("stack", k)) for n, k in entries.items() if k in registry.names("stack")]
    return [Mistake(("stack", refusal.name), refusal.text) for refusal in refusals(known)]


def instantiate(recipe: Recipe) -> Parts:
    """Import the components a recipe names and build them.

    Raises:
        RecipeError: a component refuses its options.
    """
    single = {group: build_object(group, getattr(recipe, group), group) for group in SINGLE}
    wrappers = [build_object("stack", body, f"stack.{name}", name=name) for name, body in recipe.stack.items()]
    return Parts(single["objective"], wrappers, single["optim"], single["schedule"])


def build_object(group: str, body: Mapping[str, Any], where: str, **extra: object) -> Any:
    """Build the object of one component from its validated options.

    Raises:
        RecipeError: the component refuses them.
    """
    kind = str(body["kind"])
    options = {key: value for key, value in body.items() if key != "kind"}
    checked = registry.spec(group, kind, where).schema_model.model_validate_json(_json(options))
    values = {name: getattr(checked, name) for name in type(checked).model_fields}
    try:
        return registry.load_class(group, kind, where)(**values, **extra)
    except UserError as error:
        raise type(error)(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error
    except ValidationError as error:
        at: KeyPath = tuple(where.split("."))
        raise RecipeError(report(translate(error, options, type(checked), at, kind), {})) from error


def _json(value: object) -> str:
    return json.dumps(value, default=str)


def _unset(mapping: Mapping[str, Any]) -> list[Mistake]:
    text = "the recipe requires a value here; set it in a recipe or on the command line: KEY=VALUE"
    return [Mistake(key, text) for key, value in leaves(mapping) if value == MISSING]
