"""Words that users type and that have a newer name: read in either, stored and shown in the new one.

A stage's key is renamed by its place, an option by the component that the same mapping describes. Keys of results, which were
computed in the first words, do not change with a word (`first_words`).

An old word is read in the minor version that renamed it and in the next one. Each use prints the new word, and
`llmrecipe migrate RECIPE` rewrites a file. After that it is a mistake like any other.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmrecipe.recipe.provenance import Origins
from llmrecipe.recipe.yaml_file import KeyPath, YamlFile, dotted

Above = tuple[object, ...]
"""The values that contain a value, from the whole recipe down to the one that holds it."""


@dataclass(frozen=True)
class Rename:
    """One old word, its new name, and where users type it."""

    old: str
    new: str
    since: tuple[int, int]
    """Version (major, minor) that renamed it."""
    options_of: tuple[str, ...] = ()
    """Components that have it as an option."""
    stage_key: bool = False
    """It is a key of a stage."""
    reference: bool = False
    """Stages refer to it: `${word:...}`."""
    group: bool = False
    """It is a registry group, as in `llmrecipe list GROUP` and `llmrecipe show GROUP.NAME`."""

    def is_read_in(self, version: str) -> bool:
        """Return whether a version of the package reads the old word.

        Examples:
            >>> [RENAMES[0].is_read_in(version) for version in ("0.1.0", "0.2.3", "0.3.0")]
            [True, True, False]
        """
        return _is_read(self.since, version)


def _is_read(since: tuple[int, int], version: str) -> bool:
    major, minor = (int(part) for part in version.split(".")[:2])
    return (major, minor) <= (since[0], since[1] + 1)


RENAMES = (
    Rename("each", "matrix", (0, 1), stage_key=True, reference=True),
    Rename("agent", "judge", (0, 1), options_of=("critique", "label_ai", "judge"), group=True),
)
"""Every renamed word."""


@dataclass(frozen=True)
class RenamedValue:
    """An old value of a key of the recipe, and its new name."""

    key: KeyPath
    old: bool
    new: str
    since: tuple[int, int]
    """Version (major, minor) that renamed it."""

    def is_read_in(self, version: str) -> bool:
        """Return whether a version of the package reads the old value."""
        return _is_read(self.since, version)


VALUES = (
    RenamedValue(("model", "compile"), False, "off", (0, 1)),
    RenamedValue(("model", "compile"), True, "blocks", (0, 1)),
)
"""Every renamed value."""
FIRST: Mapping[KeyPath, Mapping[object, object]] = {("model", "compile"): {"auto": False, "off": False, "blocks": True}}
"""What keys of results hold in the place of a key's newer values: those that did not exist stand for the first default."""
SPACE = ("search", "space")
"""The mapping whose keys are themselves key paths of the recipe."""


def new_words(mapping: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return a whole recipe in new words.

    Where it holds both words of one thing, the old one was set last and is merged into the new one.

    Args:
        notes: gains one line for each old word.
    """
    return _new_words(mapping, notes, (), ())


def new_value(value: object, notes: list[str], at: KeyPath) -> object:
    """Return what stands at a key path of a recipe in new words; `notes` as in `new_words`."""
    return _new_value(value, notes, at, ())


def _new_value(value: object, notes: list[str], at: KeyPath, above: Above) -> object:
    if isinstance(value, list):
        return [_new_value(item, notes, (*at, place), (*above, value)) for place, item in enumerate(value)]
    for renamed in VALUES:
        if at[-2:] == renamed.key and value is renamed.old:
            notes.append(f"{dotted(at)}: {json.dumps(value)} is called {renamed.new}")
            return renamed.new
    if isinstance(value, str) and at[:1] == ("stages",):
        return _new_references(value, notes, at)
    return _new_words(value, notes, at, above) if isinstance(value, Mapping) else value


def _new_words(mapping: Mapping[Any, Any], notes: list[str], at: KeyPath, above: Above) -> dict[Any, Any]:
    found: dict[str | int, object] = {}
    for key, inner in mapping.items():
        name = _renamed(key, at, mapping, above)
        if name != key:
            notes.append(f"{dotted((*at, key))} is called {dotted((*at, name))}")
        made = _new_value(inner, notes, (*at, name), (*above, mapping))
        found[name] = _merged(found[name], made) if name != key and name in found else found.get(name, made)
    return found


def new_path(key: KeyPath, mapping: Mapping[str, Any]) -> KeyPath:
    """Return a key path in new words; the mapping it leads through tells the kinds of components."""
    return _renamed_path(key, mapping, _renamed)


def new_group(name: str, notes: list[str]) -> str:
    """Return the name of a registry group, or `GROUP.NAME` of a component, in new words.

    Args:
        notes: gains a line for an old word.
    """
    group, dot, component = name.partition(".")
    new = next((r.new for r in RENAMES if r.group and r.old == group), group)
    if new != group:
        notes.append(f"{group} is called {new}")
    return f"{new}{dot}{component}"


def new_name(word: str) -> str:
    """Return the newest name of a word that a finished result holds, such as a column of its rows."""
    return next((r.new for r in RENAMES if r.old == word), word)


def old_names(word: str) -> list[str]:
    """Return the earlier names of a word, under which a result may have been written."""
    return [r.old for r in RENAMES if r.new == word]


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


def first_words(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return options and values under their first names, so that the key of a result does not change with a word."""
    return _first_words(mapping, (), ())


def _first_words(mapping: Mapping[Any, Any], at: KeyPath, above: Above) -> dict[Any, Any]:
    inside = (*above, mapping)
    return {_first(key, at, mapping, above): _first_words_in(inner, (*at, key), inside) for key, inner in mapping.items()}


def first_value(key: KeyPath, value: object) -> object:
    """Return a value of the recipe under its first name."""
    first = FIRST.get(key[-2:], {})
    return first.get(value, value) if isinstance(value, str) else value


def _first_words_in(value: object, at: KeyPath, above: Above) -> object:
    if isinstance(value, list):
        return [_first_words_in(item, (*at, place), (*above, value)) for place, item in enumerate(value)]
    return _first_words(value, at, above) if isinstance(value, Mapping) else first_value(at, value)


Renaming = Callable[[str | int, KeyPath, object, Above], str | int]
"""(key, path of the mapping that holds it, that mapping, the mappings above from the outermost) -> the other word."""


def _renamed(key: str | int, at: KeyPath, holder: object, above: Above = ()) -> str | int:
    """Return the new word of a key."""
    if _is_space(at, above) and isinstance(key, str):
        return dotted(_renamed_path(tuple(key.split(".")), above[-2], _renamed))
    for rename in RENAMES:
        if key == rename.old:
            if rename.stage_key and len(at) == 2 and at[0] == "stages":
                return rename.new
            if _describes(holder, at, rename.options_of):
                return rename.new
    return key


def _first(key: str | int, at: KeyPath, holder: object, above: Above = ()) -> str | int:
    """Return the first word of an option."""
    if _is_space(at, above) and isinstance(key, str):
        return dotted(_renamed_path(tuple(key.split(".")), above[-2], _first))
    return next((r.old for r in RENAMES if key == r.new and _describes(holder, at, r.options_of)), key)


def _is_space(at: KeyPath, above: Above) -> bool:
    """Return whether the keys of a mapping are key paths of the recipe two mappings above."""
    return at[-2:] == SPACE and len(above) > 1


def _renamed_path(key: KeyPath, mapping: object, renamed: Renaming) -> KeyPath:
    node: Any = mapping
    above: Above = ()
    made: list[str | int] = []
    for part in key:
        name = renamed(part, tuple(made), node, above)
        above = (*above, node)
        made.append(name)
        if isinstance(node, Mapping):
            node = node.get(part, node.get(name))
        else:
            node = node[part] if isinstance(node, list) and isinstance(part, int) and part < len(node) else None
    return tuple(made)


def _describes(holder: object, at: Sequence[str | int], kinds: tuple[str, ...]) -> bool:
    """Return whether a mapping describes one of some components: by its `kind`, or as a reward by the reward's name."""
    kind = holder.get("kind") if isinstance(holder, Mapping) else None
    if kind is None and len(at) > 1 and at[-2] == "reward":
        kind = at[-1]
    return kind in kinds


def _new_references(text: str, notes: list[str], at: KeyPath) -> str:
    for rename in RENAMES:
        old = re.compile(r"\$\{\s*" + re.escape(rename.old) + ":")
        if rename.reference and old.search(text):
            notes.append(f"{dotted(at)}: ${{{rename.old}:...}} is called ${{{rename.new}:...}}")
            text = old.sub(f"${{{rename.new}:", text)
    return text


def _merged(below: object, above: object) -> object:
    if isinstance(below, Mapping) and isinstance(above, Mapping):
        return {**below, **{k: _merged(below[k], v) if k in below else v for k, v in above.items()}}
    return above
