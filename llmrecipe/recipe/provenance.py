"""Where a value of a composed recipe comes from."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmrecipe.recipe import schema
from llmrecipe.recipe.yaml_file import KeyPath, short


@dataclass(frozen=True)
class Origin:
    """The file and line, the override, or the default in the source that set a value."""

    kind: Literal["file", "override", "default"]
    file: Path | None = None
    line: int = 0
    word: str = ""

    def __str__(self) -> str:
        if self.kind == "override":
            return f"override {self.word}"
        return f"{short(self.file)}:{self.line}" if self.file else "default"


Origins = dict[KeyPath, Origin]


def leaves(value: object, at: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield key path and value of everything in nested mappings that is not itself a non-empty mapping."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*at, key))
    else:
        yield at, value


def origin_of(origins: Mapping[KeyPath, Origin], key: KeyPath) -> Origin | None:
    """Return the origin of a key: its own, that of the first value below it, or that of the nearest key above."""
    if key in origins:
        return origins[key]
    below = [o for k, o in origins.items() if k[: len(key)] == key]
    if below:
        return below[0]
    return next((origins[key[:n]] for n in range(len(key) - 1, 0, -1) if key[:n] in origins), None)


def forget(origins: Origins, key: KeyPath) -> None:
    """Remove the origins of a key and of everything below it."""
    for known in [k for k in origins if k[: len(key)] == key]:
        del origins[known]


@functools.cache
def _schema_lines() -> dict[str, dict[str, int]]:
    """Return class -> field -> line, read from the schema's source."""
    tree = ast.parse(Path(schema.__file__).read_text(encoding="utf-8"))
    return {
        node.name: {
            item.target.id: item.lineno
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def schema_origin(key: KeyPath) -> Origin:
    """Return the line of the schema that gives a key its default."""
    lines = _schema_lines()
    head, inner = str(key[0]), [str(k) for k in key[1:]]
    line = lines["Recipe"].get(head, 1)
    field = schema.Recipe.model_fields.get(head)
    owner = getattr(field.annotation, "__name__", "") if field is not None else ""
    if inner and owner in lines:
        own = lines[owner]
        line = own.get(inner[0], own.get(f"{inner[0]}_", line))
    return Origin("default", Path(schema.__file__), line)
