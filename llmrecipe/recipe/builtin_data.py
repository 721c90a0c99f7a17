"""Built-in data sets and the rules that score them apply to a built-in `data.path` only.

`recipe=kto` trains on `builtin:unpaired` and validates on `builtin:preference`. With `data.path=feedback.jsonl` that
validation split would choose the best checkpoint by sentences of the built-in sets, so it is dropped with a one-line notice.
So is a reward that only knows these sentences. What the command line sets, or the file that sets the user's path, stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmrecipe.core import registry
from llmrecipe.recipe.content_key import REFERENCE
from llmrecipe.recipe.inheritance import DefaultsChain, Link
from llmrecipe.recipe.provenance import Origin, Origins, forget, leaves
from llmrecipe.recipe.recipe_paths import presets
from llmrecipe.recipe.yaml_file import KeyPath, dotted, read_yaml

PREFIX = "builtin:"
SOURCES: tuple[KeyPath, ...] = (("data",), ("prompts",), ("pairs",))
"""Options of a step that name rows."""


def is_builtin(path: object) -> bool:
    """Return whether every source of a `data.path` is a built-in set."""
    names = [path] if isinstance(path, str) else list(path) if isinstance(path, list | tuple | Mapping) else []
    return bool(names) and all(str(name).startswith(PREFIX) for name in names)


def drop_builtin(mapping: dict[str, Any], origins: Origins, chain: DefaultsChain) -> list[str]:
    """Remove, in place, values that files set for a built-in path where the path is the user's.

    Args:
        mapping: a composed recipe, before defaults and interpolation.

    Returns:
        One line that names everything that was removed, or an empty list.
    """
    data = mapping.get("data")
    path = data.get("path") if isinstance(data, dict) else None
    if path is None or is_builtin(path):
        return []
    dropped = []
    for key in list(_builtin_keys(mapping)):
        below = [origin for known, origin in origins.items() if known[: len(key)] == key and origin.kind != "default"]
        if below and all(_meant_for_builtin(origin, chain) for origin in below):
            dropped.append(f"{dotted(key)} ({below[0]})")
            _remove(mapping, key)
            forget(origins, key)
    source = origins.get(("data", "path"))
    return [f"dropped {', '.join(dropped)}: made for the built-in rows, and data.path is set by {source}"] if dropped else []


def notes_on_own_rows(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return one line for each stage of a pipeline that reads built-in rows although another one reads the user's.

    Args:
        stages: name -> composed mapping of the stage's recipe or step, results of other stages as `${stage:x}`.
    """
    read = {name: list(_sources(mapping)) for name, mapping in stages.items()}
    own = [(name, v) for name, found in read.items() for _, v in found if not (is_builtin(v) or REFERENCE.search(v))]
    if not own:
        return []
    return [
        f"{name}: reads {value}, and {own[0][0]} reads {own[0][1]}; give it rows of your own with stages.{name}.{dotted(key)}"
        for name, found in read.items()
        for key, value in found
        if is_builtin(value)
    ]


def _sources(mapping: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Yield the keys and names of the data a stage reads."""
    for key, value in leaves(mapping):
        if key in SOURCES or key[:2] == ("data", "path"):
            yield from ((key, name) for name in _names(value))


def _names(value: object) -> list[str]:
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]


def _builtin_keys(mapping: dict[str, Any]) -> Iterator[KeyPath]:
    """Yield keys other than the path that name built-in sets or rules; stages are recipes of their own."""
    for key, value in leaves(mapping):
        if key[0] in ("stages", "search") or key[:2] == ("data", "path"):
            continue
        if any(v.startswith(PREFIX) for v in _names(value)):
            yield key
    objective = mapping.get("objective")
    rewards = objective.get("reward") if isinstance(objective, dict) else None
    for name, body in (rewards if isinstance(rewards, dict) else {}).items():
        kind = body.get("kind", name) if isinstance(body, dict) else name
        if kind in registry.names("reward") and registry.spec("reward", kind).facts.get("builtin_rows_only"):
            yield ("objective", "reward", name)


def _meant_for_builtin(origin: Origin, chain: DefaultsChain) -> bool:
    """Return whether a file set the value where `data.path` was a built-in set for it."""
    if origin.kind != "file" or origin.file is None:
        return False
    link = next((k for k in chain.links.values() if k.source.path == origin.file), None)
    return is_builtin(_path_seen_by(link, chain) if link else _path_in(read_yaml(origin.file).value))


def _path_seen_by(link: Link, chain: DefaultsChain) -> object:
    """Return the `data.path` of a file: its own, its preset's, or that of what it extends."""
    found = _path_in(link.source.value.get("data"))
    preset = link.choices.get("data", (None, 0))[0]
    if found is None and isinstance(preset, str) and preset in presets("data"):
        found = _path_in(read_yaml(presets("data")[preset]).value)
    above = (_path_seen_by(chain.links[name], chain) for name in reversed(link.extends))
    return found if found is not None else next((path for path in above if path is not None), None)


def _path_in(section: object) -> object:
    return section.get("path") if isinstance(section, dict) else None


def _remove(mapping: dict[str, Any], key: KeyPath) -> None:
    node: Any = mapping
    for part in key[:-1]:
        node = node[part]
    del node[key[-1]]
