"""What is said of rows that cannot become those an objective needs: what they are, who takes them, which mapping would do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmrecipe.core import registry
from llmrecipe.core.errors import did_you_mean
from llmrecipe.data.formats.aliases import names_of
from llmrecipe.data.formats.data_format import DataFormat, data_format, formats_of
from llmrecipe.data.formats.messages import is_messages
from llmrecipe.data.tokenize.row_type import row_type

Row = dict[str, Any]
COMMON = ("prompt_completion", "text", "labelled", "preference", "unpaired")
"""The usual formats, which are meant first where the names of columns say nothing."""


def mismatch(formats: Sequence[DataFormat], row: Row, rows: str, where: str, other: DataFormat | None = None) -> str:
    """Return the message for rows that cannot become a row type.

    Args:
        formats: those that can become it.
        other: a format that the rows have beyond doubt, where their columns alone would do.
    """
    columns = ", ".join(row) or "(none)"
    if other is not None:
        return (
            f"{where}: these are not {rows} rows. The columns {columns} are {other.summary}; {takers_of(other)}. To use "
            f"them as {rows} rows all the same, name their format: data.format={_fitting(formats, row)}"
        )
    lines = [f"{where}: no {rows} row can be made of the columns {columns}."]
    mapping = nearest_mapping(formats, row)
    known = [one for one in _most_specific(row) if takers_of(one)]
    if known and (not mapping or len(known[0].matches(row) or ()) > 1):
        lines.append("They are " + ", or ".join(f"{one.summary}; {takers_of(one)}" for one in known) + ".")
    if inner := next((column for column, value in row.items() if _holds_rows(value)), None):
        lines.append(f"'{inner}' holds a list of objects: if they are the rows, write that list to a file of its own.")
    for found in formats:
        lines.append(f"  {found.name:<20} needs {' or '.join('+'.join(c) for c in found.columns[:3])}  ({found.summary})")
    placed = mapping_by_place(formats, row)
    example = f", perhaps {mapping_text(placed)}" if placed else " with data.columns='{wanted: column}'"
    lines.append(
        f"Nearest: {mapping_text(mapping)}" if mapping else f"Map columns{example}, or name the format with data.format."
    )
    return "\n".join(lines)


def mapping_by_place(formats: Sequence[DataFormat], row: Row) -> dict[str, str]:
    """Return the columns of the most usual format that has as many as a row of texts, in their order; empty where none has."""
    if not all(isinstance(value, str) for value in row.values()):
        return {}
    usual = [one for name in COMMON for one in formats if one.name == name and len(one.columns[0]) == len(row)]
    return dict(zip(usual[0].columns[0], map(str, row), strict=True)) if usual else {}


def _holds_rows(value: object) -> bool:
    """Return whether a value is a list of objects that are no messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and not is_messages(value)


def mapping_text(mapping: Mapping[str, str]) -> str:
    """Return a mapping of columns as a word of the command line."""
    return "data.columns='{" + ", ".join(f"{wanted}: {column}" for wanted, column in mapping.items()) + "}'"


def another_type(sample: Sequence[Row], rows: str, formats: Sequence[DataFormat]) -> DataFormat | None:
    """Return the format that claims a row of a sample, where it cannot become this row type, which would lose the column.

    Args:
        formats: those that can become the row type; one that reads the label of a row loses nothing of that.
    """
    if row_type(rows).keeps_columns:
        return None
    others = [one for one in map(data_format, registry.names("format")) if rows not in one.becomes]
    for row in sample:
        if any("label" in (one.matches(row) or ()) for one in formats):
            continue
        claiming = [one for one in others if one.claims(row)]
        if claiming:
            return next((one for one in claiming if one.matches(row) is not None), claiming[0])
    return None


def objectives_for(name: str) -> list[str]:
    """Return the objectives whose rows can be made of a format."""
    rows = {objective: registry.spec("objective", objective).facts.get("rows") for objective in registry.names("objective")}
    taken = {kind: name in formats_of(kind) for kind in set(rows.values()) if kind}
    return [objective for objective, kind in rows.items() if kind and taken[kind]]


def takers_of(found: DataFormat) -> str:
    """Say which objectives take the rows of a format; empty where none does."""
    names = objectives_for(registry.name_of(type(found)))
    if not names:
        return ""
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    return f"objective={listed} takes such rows"


def _most_specific(row: Row) -> list[DataFormat]:
    """Return the formats that a row has with the most of its columns, under their own names; exact ones first."""
    fitting = [one for one in map(data_format, registry.names("format")) if one.matches(row) is not None and one.fits(row)]
    most = max((len(one.matches(row) or ()) for one in fitting), default=0)
    return sorted(
        (one for one in fitting if len(one.matches(row) or ()) == most), key=lambda one: one.matches(row) != one.columns[0]
    )


def _fitting(formats: Sequence[DataFormat], row: Row) -> str:
    return next((one.name for one in formats if one.matches(row) is not None), formats[0].name)


def nearest_mapping(formats: Sequence[DataFormat], row: dict[str, Any]) -> dict[str, str]:
    """Return the mapping that completes a format with columns of the row, fewest renames first."""
    best: dict[str, str] = {}
    for one in formats:
        for columns in one.columns:
            mapping: dict[str, str] = {}
            for wanted in columns:
                if wanted in row:
                    continue
                column = _similar(
                    names_of(wanted, one), wanted, [c for c in row if c not in mapping.values() and c not in columns]
                )
                if column is None:
                    break
                mapping[wanted] = column
            else:
                best = mapping if not best or len(mapping) < len(best) else best
    return best


def _similar(synonyms: Sequence[str], wanted: str, columns: list[str]) -> str | None:
    lowered = {c.lower(): c for c in columns}
    for synonym in synonyms:
        if synonym in lowered:
            return lowered[synonym]
    near = did_you_mean(wanted, lowered)
    return lowered[near.split("'")[1]] if near else None
