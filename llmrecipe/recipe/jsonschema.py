"""The JSON Schema of a recipe, for editors: completion, types and descriptions while a recipe is written."""

from __future__ import annotations

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


def json_schema() -> dict[str, Any]:
    """Return the schema of a recipe file; nothing is required, since what a file leaves out comes from what it extends."""
    schema = Recipe.model_json_schema(by_alias=True)
    properties = schema["properties"]
    definitions = schema.setdefault("$defs", {})
    for section in list(definitions.values()):
        _allow_references(section)
    for group in COMPONENT_GROUPS:
        options = []
        for name in registry.names(group):
            key = f"{group}.{name}"
            definitions[key] = _component(registry.spec(group, name), definitions)
            options.append({"$ref": f"#/$defs/{key}"})
        one: dict[str, Any] = {"anyOf": options} if options else {"type": "object"}
        properties[group] = {"type": "object", "additionalProperties": one} if group == "stack" else one
    properties["defaults"] = _defaults()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "llmrecipe recipe", "required": []}


def _component(spec: registry.Spec, definitions: dict[str, Any]) -> dict[str, Any]:
    schema = spec.schema_model.model_json_schema(by_alias=True)
    definitions.update(schema.pop("$defs", {}))
    for name, option in schema.get("properties", {}).items():
        option["description"] = spec.options[name].doc
    _allow_references(schema)
    kind = {"const": spec.name, "description": f"The {spec.group} this entry is."}
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


def _defaults() -> dict[str, Any]:
    """Return the schema of the defaults list: recipes to extend, group choices, `_self_`."""
    choices: dict[str, Any] = {}
    for group in GROUPS:
        known = registry.names(group) if group in COMPONENT_GROUPS else []
        name: dict[str, Any] = {"type": "string", "examples": known} if known else {"type": ["string", "null"]}
        value = {"type": "array", "items": name} if group == "stack" else name
        choices |= dict.fromkeys((group, f"/{group}", f"override {group}", f"override /{group}"), value)
    choice = {"type": "object", "properties": choices, "additionalProperties": False, "minProperties": 1, "maxProperties": 1}
    return {
        "type": "array",
        "items": {"anyOf": [{"type": "string"}, choice]},
        "description": "What the recipe extends and chooses.",
    }
