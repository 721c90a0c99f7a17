"""Where a method trained: how far each place moved, what the method chose, how many parameters train there."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmrecipe.recipe.yaml_file import read_yaml
from llmrecipe.runs.report.maps import Map, grid_map, number_map
from llmrecipe.runs.report.places import place_table

AXES = ("layer", "place")
LARGEST = 1 << 20
"""Bytes of a `stack.yaml` from which it is left out: it lists single entries rather than places."""


def where_trained(run: Path, report: Mapping[str, Any]) -> list[Map]:
    """Return the pictures of a run.

    Args:
        report: its `report.json`: `changes` of a finished run, `grids` of methods that choose, `trained` of every run.
    """
    maps = [table_map(title, table) for title, table in report.get("changes", {}).items()]
    maps += [grid_map(title, made) for title, made in report.get("grids", {}).items()]
    maps += [table_map(title, place_table(places, note)) for title, places, note in _structures(run)]
    trained = _trained(report)
    return [*maps, table_map("Trained parameters", place_table(trained, "how many train at a place"))] if trained else maps


def table_map(title: str, table: Mapping[str, Any]) -> Map:
    """Return a table of `places.place_table` as a picture."""
    rows = table["rows"]
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    return number_map(title, table["note"], AXES, columns, rows, outside=table["outside"])


def _structures(run: Path) -> Iterator[tuple[str, dict[str, float], str]]:
    """Yield title, numbers by place and what they are of each choice that `final/stack.yaml` holds: ranks, kept entries."""
    file = run / "final" / "stack.yaml"
    layers = read_yaml(file).value.get("layers") if file.is_file() and file.stat().st_size < LARGEST else None
    for wrapper, structure in (layers[-1].get("structures") or {}).items() if layers else ():
        for name, values in structure.items():
            if isinstance(values, dict) and values:
                places = {str(place): _size(value) for place, value in values.items()}
                found = {place: size for place, size in places.items() if size is not None}
                many = any(isinstance(value, list | dict) for value in values.values())
                if found:
                    yield f"{wrapper}: {name}", found, "how many" if many else "by place"


def _size(value: object) -> float | None:
    """Return a number, the length of a list, or the `count` of a mapping; None for anything else."""
    if isinstance(value, dict):
        return _size(value.get("count"))
    if isinstance(value, bool) or not isinstance(value, int | float | list):
        return None
    return len(value) if isinstance(value, list) else value


def _trained(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the number of trained parameters of each place; a method's own tensors count at their host."""
    wrappers = set(report.get("stack") or ())
    found: dict[str, float] = defaultdict(int)
    for name, shape in ((report.get("trained") or {}).get("names") or {}).items():
        parts = str(name).split(".")
        own = next((i for i, part in enumerate(parts) if part.partition("__")[0] in wrappers), None)
        place = parts[:own] if own is not None else parts[:-1] if parts[-1] == "weight" else parts
        found[".".join(place) or str(name)] += math.prod(shape)
    return dict(found)
