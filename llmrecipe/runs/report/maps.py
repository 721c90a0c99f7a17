"""Tables of numbers as pictures: the larger a number, the stronger the colour of its cell."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from llmrecipe.core.console import number

LEVELS = 6
"""Colours of the style sheet, from nothing to the largest number."""


@dataclass(frozen=True)
class Cell:
    """One number."""

    text: str
    """Empty where there is none."""
    level: int
    where: str
    """Row, column and value in words."""
    chosen: bool = False


@dataclass(frozen=True)
class Row:
    """One line of cells."""

    name: str
    cells: list[Cell]


@dataclass(frozen=True)
class Map:
    """One table."""

    title: str
    note: str
    columns: list[str]
    rows: list[Row]
    outside: list[tuple[str, str]]
    """Name and number of what is in no row."""


def grid_map(title: str, made: dict[str, Any]) -> Map:
    """Return a table of `Wrapper.grids`: what it has marked is starred and framed."""
    names = [str(i) for i in range(max(map(len, made["values"]), default=0))]
    rows = {str(i): dict(zip(names, row, strict=False)) for i, row in enumerate(made["values"])}
    chosen = {(str(i), str(j)) for i, marked in enumerate(made["marked"]) for j in marked}
    note = f"{made['rows']}s down, {made['columns']}s across; the framed ones (*) train"
    return number_map(title, note, (made["rows"], made["columns"]), names, rows, chosen)


def number_map(
    title: str,
    note: str,
    axes: tuple[str, str],
    columns: Sequence[str],
    rows: dict[str, dict[str, float]],
    chosen: Collection[tuple[str, str]] = (),
    outside: Mapping[str, float] = MappingProxyType({}),
) -> Map:
    """Return a table of numbers.

    Args:
        note: what the numbers are.
        axes: what rows and columns are called.
        rows: row -> column -> number; columns without a number are empty.
        chosen: places that are framed.
        outside: numbers of what is in no row.
    """
    high = max((value for row in rows.values() for value in row.values()), default=0.0)

    def cell(row: str, column: str) -> Cell:
        value = rows[row].get(column)
        if value is None:
            return Cell("", 0, "")
        level = min(LEVELS - 1, int(max(value, 0.0) / high * (LEVELS - 1) + 0.5)) if high > 0 else 0
        return Cell(number(value), level, f"{axes[0]} {row}, {axes[1]} {column}: {number(value)}", (row, column) in chosen)

    made = [Row(f"{axes[0]} {row}", [cell(row, column) for column in columns]) for row in rows]
    return Map(title, note, list(columns), made, [(name, number(value)) for name, value in outside.items()])
