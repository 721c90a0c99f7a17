"""Every value of a composed recipe with the file and line, or the override, that set it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmrecipe.recipe.compose import Composition
from llmrecipe.recipe.provenance import Origin, leaves, origin_of, schema_origin
from llmrecipe.recipe.yaml_file import KeyPath, dotted


@dataclass(frozen=True)
class Line:
    """One value and where it comes from."""

    key: KeyPath
    value: Any
    origin: Origin

    def as_json(self) -> dict[str, Any]:
        """Return the facts for `--json`."""
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
    """Return one line for every value of the recipe, defaults included."""
    lines = []
    for key, value in leaves(composition.mapping):
        origin = origin_of(composition.origins, key) or schema_origin(key)
        lines.append(Line(key, value, origin))
    return lines
