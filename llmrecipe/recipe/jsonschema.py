"""The JSON Schema of a recipe, for editors: completion, types and descriptions while a recipe is written.

A validator's message is the better the closer it is to the mistake, so nothing is a choice of whole components (`anyOf`):
the kind of an entry, or the defaults list, selects the options that are checked (`if`, `then`). Names are checked in recipes
that name no plugins, whose components an editor cannot know.
"""

from __future__ import annotations

import json
from typing import Any

from llmrecipe.core import registry
from llmrecipe.recipe.recipe_paths import COMPONENT_GROUPS, GROUPS
from llmrecipe.recipe.registered_names import list_names
from llmrecipe.recipe.schema import Recipe

REFERENCE = {
    "type": "string",
    "pattern": r"\$\{[^}]+\}",
    "description": "Another value of the recipe, as in ${data.max_length}.",
}

WORDS = "^(optional )?(override )?/?{}$"
"""How an entry of a defaults list names a group."""


def schema_text() -> str:
    """Return the schema as the text of a file."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def json_schema() -> dict[str, Any]:
    """Return the schema of a recipe file; nothing is required, since what a file leaves out comes from what it extends."""
    schema = Recipe.model_json_schema(by_alias=True)
    properties = schema["properties"]
    definitions = schema.setdefault("$defs", {})
    for section in list(definitions.values()):
        _allow_references(section)
    names = {group: registry.names(group) for group in COMPONENT_GROUPS}
    for group, known in names.items():
        for name in known:
            definitions[f"{group}.{name}"] = _component(registry.spec(group, name), definitions)
        entry = {"type": "object", "properties": {"kind": {"type": "string", "examples": known}}}
        properties[group] = {"type": "object", "additionalProperties": entry} if group == "stack" else entry
    properties["defaults"] = _defaults(checked=False)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "llmrecipe recipe",
        "required": [],
        "if": {"not": {"required": ["plugins"]}},
        "then": _checked(names),
    }


def _checked(names: dict[str, list[str]]) -> dict[str, Any]:
    """Return the checks of names: of components, of their options, and of what the defaults list chooses."""
    properties: dict[str, Any] = {"defaults": _defaults(checked=True)}
    chosen: list[dict[str, Any]] = []
    for group, known in names.items():
        if group == "stack":
            properties[group] = {
                "type": "object",
                "properties": {name: _entry(group, known, name) for name in known},
                # An entry that is not called after its method says which one it is.
                "additionalProperties": {"required": ["kind"], **_entry(group, known)},
            }
            continue
        properties[group] = _entry(group, known)
        for name in known:
            body = {"if": _without_kind(), "then": {"$ref": _reference(group, name)}}
            chosen.append({"if": _chooses(group, name), "then": {"properties": {group: body}}})
    return {"properties": properties, "allOf": chosen}


def _entry(group: str, known: list[str], called: str | None = None) -> dict[str, Any]:
    """Return the schema of a component: its kind, or the method it is called after, says which options it may have."""
    options = sorted({"kind", *(option for name in known for option in registry.spec(group, name).options)})
    kinds: list[dict[str, Any]] = [
        {"if": {"properties": {"kind": {"const": name}}, "required": ["kind"]}, "then": {"$ref": _reference(group, name)}}
        for name in known
    ]
    if called is not None:
        kinds.append({"if": _without_kind(), "then": {"$ref": _reference(group, called)}})
    elif group != "stack":
        kinds.append({"if": _without_kind(), "then": {"propertyNames": {"enum": options}}})
    return {"type": "object", "properties": {"kind": {"enum": known}}, "allOf": kinds}


def _reference(group: str, name: str) -> str:
    return f"#/$defs/{group}.{name}"


def _without_kind() -> dict[str, Any]:
    return {"not": {"required": ["kind"]}}


def _chooses(group: str, name: str) -> dict[str, Any]:
    """Return the condition that a defaults list chooses a component."""
    choice = {"type": "object", "minProperties": 1, "propertyNames": {"pattern": WORDS.format(group)}}
    entry = {**choice, "additionalProperties": {"const": name}}
    return {"properties": {"defaults": {"type": "array", "contains": entry}}, "required": ["defaults"]}


def _component(spec: registry.Spec, definitions: dict[str, Any]) -> dict[str, Any]:
    schema = spec.schema_model.model_json_schema(by_alias=True)
    definitions.update(schema.pop("$defs", {}))
    for name, option in schema.get("properties", {}).items():
        option["description"] = spec.options[name].doc
    _allow_references(schema)
    kind = {"enum": [spec.name], "description": f"The {spec.group} this entry is."}
    properties = {"kind": kind, **schema.get("properties", {})}
    return {
        "type": "object",
        "title": spec.name,
        "description": spec.doc,
        "properties": properties,
        "additionalProperties": False,
    }


def _allow_references(schema: dict[str, Any]) -> None:
    """Let every option also be `${another.key}`."""
    for name, option in schema.get("properties", {}).items():
        list_names(option)
        kept = {key: option.pop(key) for key in ("title", "description", "default", "examples") if key in option}
        if option.get("type") == "string" and "enum" not in option:
            schema["properties"][name] = {**option, **kept}
        else:
            schema["properties"][name] = {"anyOf": [option, REFERENCE], **kept}
    schema.pop("required", None)


def _defaults(checked: bool) -> dict[str, Any]:
    """Return the schema of the defaults list: recipes to extend, group choices, `_self_`.

    Args:
        checked: objectives and methods must be known. Optimizers and schedules may also be presets of the user's.
    """
    choices: dict[str, Any] = {}
    for group in GROUPS:
        known = registry.names(group) if group in COMPONENT_GROUPS else []
        name: dict[str, Any] = {"type": "string", "examples": known} if known else {"type": ["string", "null"]}
        if checked and group in ("objective", "stack"):
            name = {"enum": known}
        value = {"anyOf": [{"type": "array", "items": name}, name]} if group == "stack" and not checked else name
        if group == "stack" and checked:
            value = {"if": {"type": "array"}, "then": {"items": name}, "else": name}
        choices[WORDS.format(group)] = value
    # Groups of the user's own are folders next to the recipe.
    own: dict[str, Any] = {WORDS.format("[A-Za-z_][A-Za-z0-9_]*"): {}}
    choice = {
        "type": "object",
        "patternProperties": {**choices, **own},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    return {
        "type": "array",
        "items": {"if": {"type": "string"}, "else": choice},
        "description": "What the recipe extends and chooses.",
    }
