"""The committed numbers: JSON files beside this one, each entry with the reason of its last change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RUNS = HERE / "expected"
"""One file a golden run."""
COUNTERS = HERE / "counters.json"
IMPORTS = HERE / "imports.json"


def read(path: Path) -> Any:
    """Read one of the files; an empty mapping where it has not been written."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(path: Path, value: dict[str, Any]) -> None:
    """Write one of the files, a line for each innermost entry, so that a change is a line of the diff."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(_lines(value, 0) + "\n", encoding="utf-8")


def _lines(value: Any, depth: int) -> str:
    """JSON that breaks lines only where something below is itself a mapping or a list of mappings."""
    pad, end = " " * (depth + 1), " " * depth
    if isinstance(value, dict) and any(isinstance(v, dict | list) for v in value.values()):
        rows = [f"{pad}{json.dumps(k)}: {_lines(v, depth + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{end}}}"
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        return "[\n" + ",\n".join(pad + _lines(v, depth + 1) for v in value) + f"\n{end}]"
    return json.dumps(value, ensure_ascii=False)
