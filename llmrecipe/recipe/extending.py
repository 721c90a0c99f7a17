"""A composed recipe as a short file: what it chooses, and the values that differ from the defaults of `/base`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmrecipe.core import registry
from llmrecipe.recipe.compose import section_defaults, to_yaml
from llmrecipe.recipe.interpolation import escape
from llmrecipe.recipe.yaml_file import choice_lines, write_yaml

CHOSEN = ("objective", "optim", "schedule")
"""Groups of which one component is chosen."""


def extending_yaml(mapping: dict[str, Any]) -> str:
    """Return a composed mapping as text that extends `/base` and composes to the same mapping.

    A value that a merge cannot express, a mapping without some key of its default, has the whole mapping written instead.
    """
    choices: dict[str, str | list[str]] = {"objective": str(mapping["objective"]["kind"])}
    if mapping["stack"]:
        choices["stack"] = list(mapping["stack"])
    choices |= {group: str(mapping[group]["kind"]) for group in CHOSEN[1:]}
    defaults = section_defaults() | {group: registry.spec(group, str(choices[group])).defaults() for group in CHOSEN}
    defaults["stack"] = {name: registry.spec("stack", str(body["kind"])).defaults() for name, body in mapping["stack"].items()}
    try:
        body = _differing(mapping, defaults)
    except KeyError:
        return to_yaml(mapping)
    lines = ["defaults:", "  - /base", *choice_lines(choices), "  - _self_"]
    return "\n".join(lines) + "\n" + (write_yaml(escape(body)) if body else "")


def _differing(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a mapping adds to the defaults or sets to another value.

    Raises:
        KeyError: it lacks a key of the defaults.
    """
    for key in defaults:
        given[key]
    found: dict[str, Any] = {}
    for key, value in given.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict) and default:
            if inner := _differing(value, default):
                found[key] = inner
        elif key not in defaults or value != default or type(value) is not type(default):
            found[key] = value
    return found
