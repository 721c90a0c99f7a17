"""The JSON Schema of recipes: it takes every packaged recipe, and a validator's message names the key of a mistake."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from llmrecipe.recipe.jsonschema import json_schema
from llmrecipe.recipe.recipe_paths import packaged, recipes_in
from llmrecipe.recipe.yaml_file import read_yaml

SCHEMA = json_schema()
TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None), "boolean": bool,
}  # fmt: skip
MEANT = (
    "type", "enum", "const", "anyOf", "allOf", "not", "if", "then", "else", "$ref", "properties", "patternProperties",
    "additionalProperties", "propertyNames", "required", "minProperties", "maxProperties", "items", "contains",
)  # fmt: skip
NOTED = (
    "$schema", "$defs", "title", "description", "default", "examples", "pattern", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems", "prefixItems", "format", "uniqueItems",
)  # fmt: skip
"""Keywords that say nothing about names; they are left to a real validator."""


def errors(schema: Any, value: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path, message) of what a schema refuses: the part of JSON Schema that decides about names."""
    if isinstance(schema, bool):
        if not schema:
            yield at, "not allowed"
        return
    unknown = set(schema) - {*MEANT, *NOTED}
    assert not unknown, unknown
    if "$ref" in schema:
        yield from errors(SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], value, at)
    kinds = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", [])
    fits = any(isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool)) for kind in kinds)
    if kinds and not fits:
        yield at, f"{value!r} is not of type {kinds}"
        return
    allowed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if allowed is not None and value not in allowed:
        yield at, f"{value!r} is not one of {allowed}"
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        yield at, f"{value!r} does not match {schema['pattern']}"
    for one in schema.get("allOf", []):
        yield from errors(one, value, at)
    if "anyOf" in schema and all(any(errors(one, value)) for one in schema["anyOf"]):
        yield at, f"{value!r} fits none"
    if "not" in schema and not any(errors(schema["not"], value)):
        yield at, "not allowed"
    if "if" in schema:
        yield from errors(schema.get("else" if any(errors(schema["if"], value)) else "then", True), value, at)
    if isinstance(value, dict):
        yield from _object_errors(schema, value, at)
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from errors(schema.get("items", True), item, f"{at}/{index}")
        if "contains" in schema and all(any(errors(schema["contains"], item)) for item in value):
            yield at, "does not contain it"


def _object_errors(schema: dict[str, Any], value: dict[str, Any], at: str) -> Iterator[tuple[str, str]]:
    for name in schema.get("required", []):
        if name not in value:
            yield at, f"'{name}' is a required property"
    if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", len(value)):
        yield at, "too few or too many properties"
    for name, inner in value.items():
        yield from errors(schema.get("propertyNames", True), name, at)
        checks = [found for pattern, found in schema.get("patternProperties", {}).items() if re.search(pattern, name)]
        checks += [schema["properties"][name]] if name in schema.get("properties", {}) else []
        for check in checks or [schema.get("additionalProperties", True)]:
            if check is False:
                yield at, f"'{name}' was unexpected"
            else:
                yield from errors(check, inner, f"{at}/{name}")


def validated(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what the schema refuses, by `jsonschema` too where it is installed."""
    found = [(path.lstrip("/"), message) for path, message in errors(SCHEMA, recipe)]
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        return found
    real = list(Draft202012Validator(SCHEMA).iter_errors(recipe))
    assert {"/".join(map(str, error.absolute_path)) for error in real} == {path for path, _ in found}
    return [("/".join(map(str, error.absolute_path)), error.message) for error in real]


def test_every_packaged_recipe_is_valid() -> None:
    wrong = {name: validated(read_yaml(path).value) for name, path in recipes_in(packaged()).items()}
    assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.parametrize(
    ("recipe", "path", "named"),
    [
        ({"defaults": ["/base", {"override /stack": ["loraa"]}]}, "defaults/1/override /stack/0", "loraa"),
        ({"defaults": [{"override /stack": "loraa"}]}, "defaults/0/override /stack", "loraa"),
        ({"defaults": ["/base", {"override /objective": "dpoo"}]}, "defaults/1/override /objective", "dpoo"),
        ({"defaults": [{"overide /stack": ["lora"]}]}, "defaults/0", "overide /stack"),
        ({"defaults": [{"override /objective": "dpo"}], "objective": {"epsilon": 1}}, "objective", "epsilon"),
        ({"objective": {"kind": "dpoo"}}, "objective/kind", "dpoo"),
        ({"objective": {"kind": "dpo", "betaa": 0.1}}, "objective", "betaa"),
        ({"objective": {"betaa": 0.1}}, "objective", "betaa"),
        ({"stack": {"lora": {"rr": 8}}}, "stack/lora", "rr"),
        ({"stack": {"loraa": {"r": 8}}}, "stack/loraa", "kind"),
        ({"stack": {"second": {"kind": "lor"}}}, "stack/second/kind", "lor"),
        ({"stack": {"second": {"kind": "lora", "depth": 8}}}, "stack/second", "depth"),
        ({"optim": {"lrr": 1}}, "optim", "lrr"),
        ({"optm": {"lr": 1}}, "", "optm"),
        ({"data": {"pth": "rows.jsonl"}}, "data", "pth"),
    ],
)
def test_a_mistake_is_at_its_key_and_its_message_names_it(recipe: dict[str, Any], path: str, named: str) -> None:
    found = validated(recipe)
    assert path in {where for where, _ in found}
    assert all(f"'{named}'" in message for where, message in found if where == path), found


@pytest.mark.parametrize(
    "recipe",
    [
        {"defaults": ["/base", {"optional model": "mine"}, {"experiment": "fast"}, {"override /optim": "my_preset"}, "_self_"]},
        {"defaults": [{"override /stack": "lora"}, {"/objective": "dpo"}], "objective": {"beta": "${optim.lr}"}},
        {"plugins": ["mine"], "stack": {"own": {"depth": 3}}, "objective": {"kind": "theirs", "depth": 3}},
        {"stack": {"second": {"kind": "lora", "r": 4}, "lora": {"kind": "dora"}}},
    ],
)
def test_what_is_right_passes(recipe: dict[str, Any]) -> None:
    assert validated(recipe) == []


def test_the_schema_is_json() -> None:
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
