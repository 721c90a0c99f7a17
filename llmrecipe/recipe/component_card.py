"""Facts about one name for `show`: a component's card, a recipe's card, a section's keys."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.recipe.inheritance import DefaultsChain
from llmrecipe.recipe.recipe_paths import COMPONENT_GROUPS, PRESET_GROUPS, all_recipes, presets
from llmrecipe.recipe.registered_names import list_names
from llmrecipe.recipe.schema import Recipe
from llmrecipe.recipe.section import Section
from llmrecipe.recipe.yaml_file import short


def headline(path: Path) -> str:
    """Return the first comment line of a recipe or preset."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").strip()
    return ""


def comment(path: Path) -> list[str]:
    """Return the comment at the top of a recipe."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" ").rstrip())
    return lines


@functools.cache
def users(group: str, kind: str) -> list[str]:
    """Return the recipes that choose a component, read from their defaults lists and bodies."""
    found: list[str] = []
    for name, path in all_recipes().items():
        try:
            chain = DefaultsChain(path)
        except RecipeError:
            continue
        choice = chain.choice(chain.primary.id, group)
        chosen = choice if isinstance(choice, list) else [choice]
        body = chain.primary.source.value.get(group)
        entries = body.values() if group == "stack" and isinstance(body, dict) else [body]
        kinds = [entry.get("kind") for entry in entries if isinstance(entry, dict)]
        if kind in chosen or kind in kinds:
            found.append(name)
    return found


def component_card(spec: registry.Spec) -> dict[str, Any]:
    """Return everything the source of a component says about it."""
    properties = spec.schema_model.model_json_schema().get("properties", {})
    options = [
        {
            "name": option.name,
            "type": option.type_text,
            "default": spec.defaults().get(option.name) if option.default is not ... else None,
            "required": option.default is ...,
            "description": option.doc,
            "allowed": _bounds(properties.get(option.name, {})),
        }
        for option in spec.options.values()
    ]
    return {
        "group": spec.group,
        "name": spec.name,
        "family": spec.family,
        "file": str(spec.path),
        "line": spec.line,
        "doc": spec.doc,
        "papers": spec.papers,
        "options": options,
        "facts": {
            key: list(value) if isinstance(value, tuple) else value for key, value in spec.facts.items() if key != DOCUMENTS
        },
        "recipes": users(spec.group, spec.name) if spec.group in COMPONENT_GROUPS else [],
        "parts": [part_card(spec, path) for path in _documents(spec)],
    }


DOCUMENTS = "documents"
"""Fact of a family: the source files that explain its parts."""


def _documents(spec: registry.Spec) -> list[Path]:
    return [(spec.path.parent / name).resolve() for name in spec.facts.get(DOCUMENTS) or ()]


def part_card(spec: registry.Spec, path: Path) -> dict[str, Any]:
    """Return what the docstring of a source file says about one part of a family, without importing it."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    papers = sorted(set(registry.ARXIV.findall(doc)))
    return {"group": "part", "name": path.stem, "family": spec.name, "file": str(path), "line": 1, "doc": doc, "papers": papers}


def _parts() -> list[tuple[registry.Spec, Path]]:
    families = [registry.spec("family", name) for name in registry.names("family")]
    return [(spec, path) for spec in families for path in _documents(spec)]


SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _bounds(schema: dict[str, Any]) -> str:
    list_names(schema)
    if "$ref" in schema:
        return "mapping"
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "enum" in schema.get("items", {}):
        return f"list of {' | '.join(map(str, schema['items']['enum']))}"
    if "anyOf" in schema:
        return " | ".join(part for part in (_bounds(s) or str(s.get("type", "")) for s in schema["anyOf"]) if part)
    bounds = [f"{sign} {schema[key]:g}" for key, sign in SIGNS.items() if key in schema]
    return " ".join([str(schema.get("type", "")), ", ".join(bounds)]).strip()


def recipe_card(name: str, path: Path) -> dict[str, Any]:
    """Return the comment, the choices and the text of a recipe."""
    chain = DefaultsChain(path)
    choices = {group: chain.choice(chain.primary.id, group) for group in COMPONENT_GROUPS}
    extends = [short(chain.links[i].source.path) for i in chain.primary.extends]
    text = path.read_text(encoding="utf-8")
    return {
        "group": "recipes",
        "name": name,
        "file": str(path),
        "doc": "\n".join(comment(path)),
        "extends": extends,
        **choices,
        "text": text,
    }


def section_card(name: str) -> dict[str, Any]:
    """Return the keys of a section of a recipe."""
    field = Recipe.model_fields[name]
    inner = field.annotation
    model = inner if isinstance(inner, type) and issubclass(inner, Section) else None
    options: list[dict[str, Any]] = []
    if model is not None:
        schema = model.model_json_schema(by_alias=True)["properties"]
        for key, option in model.model_fields.items():
            shown = option.alias or key
            default = option.get_default(call_default_factory=True)
            facts = {
                "type": _bounds(schema[shown]),
                "default": default,
                "required": option.is_required(),
                "allowed": _bounds(schema[shown]),
            }
            options.append({"name": shown, "description": option.description or "", **facts})
    doc = field.description or (model.__doc__ if model else "") or _component_section(name)
    return {"group": "section", "name": name, "doc": doc, "options": options, "presets": sorted(presets(name))}


def _component_section(name: str) -> str:
    if name in COMPONENT_GROUPS:
        return f"Choose with {name}={'[NAME, ...]' if name == 'stack' else 'NAME'}: {', '.join(registry.names(name))}"
    return "A top-level key of a recipe."


def find_cards(name: str) -> list[dict[str, Any]]:
    """Return every card of that name: components, recipes, presets, sections.

    Raises:
        RecipeError: nothing has that name.
    """
    group, _, bare = name.rpartition(".")
    specs = [s for s in registry.find(bare) if not group or s.group == group]
    cards = [component_card(spec) for spec in specs]
    cards += [part_card(spec, path) for spec, path in _parts() if path.stem == name]
    recipes = all_recipes()
    if name in recipes:
        cards.append(recipe_card(name, recipes[name]))
    if name in Recipe.model_fields:
        cards.append(section_card(name))
    for owner in PRESET_GROUPS:
        path = presets(owner).get(bare)
        if path is not None and (not group or group == owner):
            text = path.read_text(encoding="utf-8")
            cards.append({"group": owner, "name": bare, "file": str(path), "doc": "\n".join(comment(path)), "text": text})
    if cards:
        return cards
    known = [n for g in registry.groups() for n in registry.names(g)] + [*recipes, *Recipe.model_fields]
    known += [n for g in PRESET_GROUPS for n in presets(g)] + [path.stem for _, path in _parts()]
    raise RecipeError(f"show: nothing is called '{name}'{did_you_mean(name, known)}; `llmrecipe list` shows all names")
