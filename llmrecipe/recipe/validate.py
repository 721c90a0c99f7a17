"""From a composed mapping to the validated `Recipe`, and from that to objects.

Every mistake of a recipe is found in one pass and listed together: the key's path, what was given, what is allowed,
the nearest spelling, and the file and line (or the override) that set it. Nothing here imports
torch except `instantiate`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError, UserError, did_you_mean
from llmrecipe.recipe import memory_rules, packing_rules, sharding_rules, trained_tokenizer
from llmrecipe.recipe.key_hints import OTHER_TRAINERS, component_as_section, elsewhere
from llmrecipe.recipe.provenance import Origin, leaves, origin_of
from llmrecipe.recipe.registered_names import unknown_names
from llmrecipe.recipe.schema import Recipe, Section
from llmrecipe.recipe.stack_rules import Declared, refusals
from llmrecipe.recipe.yaml_file import KeyPath, dotted

SINGLE = ("objective", "optim", "schedule")
"""Groups a recipe has exactly one component of."""
MISSING = "???"
LARGEST = 2**53
"""The least whole number that no option may have."""


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong."""

    key: KeyPath
    text: str


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
            memory_rules.memory_mistakes,
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


def merge_mistakes(endless: list[Mistake], mistakes: list[Mistake]) -> list[Mistake]:
    """Merge both lists so that each value is reported once: as precisely as its type can, at its own key."""
    keys = {mistake.key for mistake in mistakes}
    deeper = [e for e in endless if e.key not in keys]
    return [m for m in mistakes if not any(e.key[: len(m.key)] == m.key for e in deeper)] + deeper


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


# --- messages ---------------------------------------------------------------------------------------------------------


def report(mistakes: list[Mistake], origins: Mapping[KeyPath, Origin]) -> str:
    """Return the message for a list of mistakes, in the order of their keys' first appearance."""
    lines: list[str] = []
    for mistake in mistakes:
        origin = origin_of(origins, mistake.key) if origins else None
        where = f" [{origin}]" if origin is not None else ""
        line = f"{dotted(mistake.key) or 'recipe'}: {mistake.text}{where}"
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def translate(
    error: ValidationError,
    given: Mapping[str, Any],
    model: type[BaseModel],
    at: KeyPath,
    owner: str = "",
    recipe: Mapping[str, Any] | None = None,
) -> list[Mistake]:
    """Translate Pydantic's errors into this project's messages; the branches of a union become one line."""
    grouped: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors():
        key = _given_path(detail, given)
        grouped.setdefault(key, []).append(detail)
    # A mapping or list that one branch of a union reads to its depths is no text, as the other branches want it to be.
    grouped = {key: found for key, found in grouped.items() if not any(_inside(other, key) for other in grouped)}
    mistakes: list[Mistake] = []
    for key, details in grouped.items():
        unknown = next((d for d in details if d["type"] in ("extra_forbidden", "unexpected_keyword_argument")), None)
        if unknown is not None:
            mistakes.append(Mistake((*at, *key), _unknown_key(model, at, key, owner, recipe or {})))
        elif details[0]["type"] in ("missing", "missing_keyword_only_argument"):
            mistakes.append(Mistake((*at, *key), f"must be given; {owner or 'it'} has no default for it"))
        else:
            wanted = list(dict.fromkeys(_wanted(d) for d in details))
            value = details[0]["input"] if len(details) == 1 else _value_at(given, key)
            mistakes.append(
                Mistake((*at, *key), f"must be {' or '.join(wanted)}; got {yaml_text(value)}{_hint(details, value)}")
            )
    return mistakes


def _given_path(detail: ErrorDetails, given: Mapping[str, Any]) -> KeyPath:
    """Return the part of an error's location that exists in the given value; the rest names branches of a union."""
    node: Any = given
    path: list[str | int] = []
    for part in detail["loc"]:
        if isinstance(node, Mapping) and str(part) in node:
            node = node[str(part)]
            path.append(str(part))
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
            path.append(part)
        elif detail["type"].startswith("missing"):
            path.append(part)
            break
    return tuple(path)


def _inside(path: KeyPath, outer: KeyPath) -> bool:
    return len(path) > len(outer) and path[: len(outer)] == outer


def _value_at(given: Mapping[str, Any], key: KeyPath) -> object:
    node: Any = given
    for part in key:
        node = node[part]
    return node


def _unknown_key(model: type[BaseModel], at: KeyPath, key: KeyPath, owner: str, recipe: Mapping[str, Any]) -> str:
    name, place, owner = str(key[-1]), (*at, *key), owner or dotted((*at, *key[:-1]))
    for part in key[:-1]:
        field = model.model_fields.get(str(part))
        kinds = (field.annotation, *get_args(field.annotation)) if field is not None else ()
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), model)
    known = [field.alias or n for n, field in model.model_fields.items()]
    meanings = {field.alias or n: field.description or "" for n, field in model.model_fields.items()}
    misplaced = component_as_section(name, recipe.get(name), recipe) if model is Recipe else ""
    other = elsewhere(name, place, recipe) if recipe else ""
    # The very name in a method of this recipe's stack comes before a name that is only like it.
    here = other if other.startswith("; did you mean 'stack.") else ""
    if model is Recipe and not misplaced and name in OTHER_TRAINERS:
        here = f"; did you mean '{OTHER_TRAINERS[name]}'?"
    hint = misplaced or here or did_you_mean(name, known, meanings) or other
    if model is Recipe:
        return f"a recipe has no key '{name}'{hint}" + ("" if hint else f" (keys: {', '.join(known)})")
    noun = "option" if not issubclass(model, Section) else "key"
    return f"{owner} has no {noun} '{name}'{hint}" + ("" if hint else f" ({noun}s: {', '.join(known) or 'none'})")


TYPES = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
    "finite_number": "a finite number",
    "tuple_type": "a list",
    "set_type": "a list",
    "dataclass_type": "a mapping",
}
BOUNDS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", ">="),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "<="),
}
LENGTHS = {
    "too_short": ("a list", "min_length", "at least"),
    "too_long": ("a list", "max_length", "at most"),
    "string_too_short": ("text", "min_length", "length at least"),
    "string_too_long": ("text", "max_length", "length at most"),
}


def _wanted(detail: ErrorDetails) -> str:
    kind = detail["type"]
    context = detail.get("ctx", {})
    if kind in BOUNDS:
        name, sign = BOUNDS[kind]
        return f"{sign} {context[name]:g}"
    if kind in ("literal_error", "enum"):
        expected = str(context["expected"]).replace(" or ", ", ")
        return f"one of {expected}" if ", " in expected else expected
    if kind == "string_pattern_mismatch":
        return f"text that matches {context['pattern']}"
    if kind in LENGTHS:
        what, name, bound = LENGTHS[kind]
        return f"{what} of {bound} {context[name]}"
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error", detail["msg"]))
    if kind in TYPES:
        return TYPES[kind]
    return detail["msg"][0].lower() + detail["msg"][1:]


def _hint(details: list[ErrorDetails], value: object) -> str:
    """Return a hint at what the user most likely meant."""
    kinds = {d["type"] for d in details}
    for detail in details:
        if detail["type"] == "literal_error" and isinstance(value, str):
            choices = [c.strip("'") for c in str(detail["ctx"]["expected"]).replace(" or ", ", ").split(", ")]
            return did_you_mean(value, choices)
    if isinstance(value, str):
        if "bool_type" in kinds and value.lower() in ("yes", "no", "on", "off", "y", "n", "true", "false"):
            return f"; write {'true' if value.lower() in ('yes', 'on', 'y', 'true') else 'false'}"
        if kinds & {"int_type", "float_type", "int_from_float"} and _is_number(value):
            return "; write it without quotes and leading zeros"
    if isinstance(value, bool) and "literal_error" in kinds:
        return f"; write {'on' if value else 'off'}" if "'on'" in str(details[0].get("ctx")) else ""
    if isinstance(value, float) and kinds & {"int_type", "int_from_float"} and value.is_integer() and abs(value) < 1e15:
        return f"; write {int(value)}"
    if isinstance(value, int | float) and kinds == {"string_type"}:
        return "; put it in quotes: '\"...\"' on the command line"
    if value is None:
        return " (there is nothing after the colon); remove the line to use the default"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text.replace("_", ""))
    except ValueError:
        return False
    return True


def yaml_text(value: object) -> str:
    """Return a given value as it looks in YAML, shortened."""
    text = json.dumps(value, default=str, ensure_ascii=False) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
