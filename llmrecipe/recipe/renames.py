"""Words of recipes that have a newer name: read in either, stored and shown in the new one.

A stage's key is renamed by its place, an option of a component by the kind that stands in the same mapping.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmrecipe.recipe.provenance import Origins
from llmrecipe.recipe.yaml_file import KeyPath, YamlFile, dotted


@dataclass(frozen=True)
class Rename:
    """One old word and its new name."""

    old: str
    new: str
    kinds: tuple[str, ...] = ()
    """Components that have it as an option; without any it is a key of a stage."""


RENAMES = (Rename("each", "matrix"),)
"""Every renamed word."""
AXIS = re.compile(r"\$\{\s*each:")
"""How a stage named its value on an axis of `each`."""


def new_words(value: Any, notes: list[str], at: KeyPath = ()) -> Any:
    """Return a mapping of a recipe in new words.

    Where it holds both words of one thing, the old one was set last and is merged into the new one.

    Args:
        value: a whole recipe, or what stands at the key path `at`.
        notes: gains one line for each old word.
    """
    if isinstance(value, list):
        return [new_words(item, notes, (*at, place)) for place, item in enumerate(value)]
    if isinstance(value, str) and at[:1] == ("stages",) and AXIS.search(value):
        notes.append(f"{dotted(at)}: ${{each:...}} is called ${{matrix:...}}")
        return AXIS.sub("${matrix:", value)
    if not isinstance(value, Mapping):
        return value
    found: dict[str, Any] = {}
    for key, inner in value.items():
        name = _new(key, at, value)
        if name != key:
            notes.append(f"{dotted((*at, key))} is called {dotted((*at, name))}")
        made = new_words(inner, notes, (*at, name))
        found[name] = _merged(found[name], made) if name != key and name in found else found.get(name, made)
    return found


def new_path(key: KeyPath, mapping: Mapping[str, Any]) -> KeyPath:
    """Return a key path in new words; the mapping it leads through tells the kinds of components."""
    node: Any = mapping
    made: list[str | int] = []
    for part in key:
        name = _new(part, tuple(made), node)
        made.append(name)
        if isinstance(node, Mapping):
            node = node.get(part, node.get(name))
        else:
            node = node[part] if isinstance(node, list) and isinstance(part, int) and part < len(node) else None
    return tuple(made)


def renamed_file(source: YamlFile, notes: list[str]) -> YamlFile:
    """Return a file's mapping in new words, each key with its line."""
    found: list[str] = []
    value = new_words(source.value, found)
    if not found:
        return source
    notes += found
    return dataclasses.replace(source, value=value, lines={new_path(k, source.value): n for k, n in source.lines.items()})


def rename_in_place(mapping: dict[str, Any], origins: Origins, notes: list[str]) -> None:
    """Rewrite a composed mapping and the origins of its values in new words."""
    found: list[str] = []
    made = new_words(mapping, found)
    if found:
        notes += found
        moved = {new_path(key, mapping): origin for key, origin in origins.items()}
        origins.clear()
        origins.update(moved)
        mapping.clear()
        mapping.update(made)


def first_words(value: Any) -> Any:
    """Return the options of components under their first names, so that the key of a result does not change with a word."""
    if isinstance(value, list):
        return [first_words(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    first = {r.new: r.old for r in RENAMES if value.get("kind") in r.kinds}
    return {first.get(key, key): first_words(inner) for key, inner in value.items()}


def _new(key: Any, at: Sequence[str | int], holder: Any) -> Any:
    kind = holder.get("kind") if isinstance(holder, Mapping) else None
    for rename in RENAMES:
        if key == rename.old and (kind in rename.kinds if rename.kinds else len(at) == 2 and at[0] == "stages"):
            return rename.new
    return key


def _merged(below: Any, above: Any) -> Any:
    if isinstance(below, Mapping) and isinstance(above, Mapping):
        return {**below, **{k: _merged(below[k], v) if k in below else v for k, v in above.items()}}
    return above
