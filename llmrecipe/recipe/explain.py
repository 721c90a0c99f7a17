"""Every value of a composed recipe with the file and line, or the word of the command line, that set it."""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrecipe.recipe import schema
from llmrecipe.recipe.compose import Composition
from llmrecipe.recipe.origins import Origin, leaves, origin_of
from llmrecipe.recipe.yaml_file import KeyPath, dotted


@dataclass(frozen=True)
class Line:
    """One value and where it comes from."""

    key: KeyPath
    value: Any
    origin: Origin

    def as_json(self) -> dict[str, Any]:
        """Facts for `--json`."""
        file = str(self.origin.file) if self.origin.file else None
        return {
            "key": dotted(self.key),
            "value": self.value,
            "source": self.origin.kind,
            "file": file,
            "line": self.origin.line or None,
            "override": self.origin.word or None,
        }


def explain(composition: Composition) -> list[Line]:
    """One line for every value of the recipe, defaults included."""
    lines = []
    for key, value in leaves(composition.mapping):
        origin = origin_of(composition.origins, key) or schema_origin(key)
        lines.append(Line(key, value, origin))
    return lines


@functools.cache
def _schema_lines() -> dict[str, dict[str, int]]:
    """Class -> field -> line, read from the schema's source."""
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
    """The line of the schema that gives a key its default."""
    lines = _schema_lines()
    head, inner = str(key[0]), [str(k) for k in key[1:]]
    line = lines["Recipe"].get(head, 1)
    field = schema.Recipe.model_fields.get(head)
    owner = getattr(field.annotation, "__name__", "") if field is not None else ""
    if inner and owner in lines:
        own = lines[owner]
        line = own.get(inner[0], own.get(f"{inner[0]}_", line))
    return Origin("default", Path(schema.__file__), line)
