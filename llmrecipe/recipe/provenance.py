"""Where a value of a composed recipe comes from."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmrecipe.recipe.schema import Recipe
from llmrecipe.recipe.section import Section
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
def _declared(section: type[Section]) -> tuple[Path, dict[str, int]]:
    """Return the source file of a section and the line of each of its fields."""
    file = Path(inspect.getfile(section))
    body = next(
        node.body
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == section.__name__
    )
    return file, {n.target.id: n.lineno for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}


def schema_origin(key: KeyPath) -> Origin:
    """Return the line of the schema that gives a key its default."""
    head, inner = str(key[0]), [str(k) for k in key[1:]]
    field = Recipe.model_fields.get(head)
    owner = field.annotation if field is not None else None
    if inner and isinstance(owner, type) and issubclass(owner, Section):
        file, lines = _declared(owner)
        if line := lines.get(inner[0], lines.get(f"{inner[0]}_", 0)):
            return Origin("default", file, line)
    file, lines = _declared(Recipe)
    return Origin("default", file, lines.get(head, 1))
