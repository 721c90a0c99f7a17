"""What is wrong with a recipe, in words.

A message names the key's path, what was given, what is allowed, the nearest spelling, and the file and line (or the override)
that set it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llmrecipe.core.errors import did_you_mean
from llmrecipe.recipe.key_hints import OTHER_TRAINERS, component_as_section, elsewhere
from llmrecipe.recipe.provenance import Origin, origin_of
from llmrecipe.recipe.schema import Recipe
from llmrecipe.recipe.section import Section
from llmrecipe.recipe.yaml_file import KeyPath, dotted


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong."""

    key: KeyPath
    text: str


def merge_mistakes(endless: list[Mistake], mistakes: list[Mistake]) -> list[Mistake]:
    """Merge both lists so that each value is reported once: as precisely as its type can, at its own key."""
    keys = {mistake.key for mistake in mistakes}
    deeper = [e for e in endless if e.key not in keys]
    return [m for m in mistakes if not any(e.key[: len(m.key)] == m.key for e in deeper)] + deeper


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
