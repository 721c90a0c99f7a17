"""Detecting the format of rows, and the message when none matches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmrecipe.core.errors import DataError, did_you_mean
from llmrecipe.data.formats.aliases import names_of, recognise
from llmrecipe.data.formats.data_format import Conversion, DataFormat, data_format, formats_of
from llmrecipe.data.formats.messages import read_cells
from llmrecipe.data.tokenize.row_type import row_type


@dataclass(frozen=True)
class DetectedFormat:
    """The format of some rows, and the mapping of its columns to theirs."""

    format: DataFormat
    aliases: dict[str, str] = field(default_factory=dict)
    """Recognised columns: wanted -> column."""

    @property
    def name(self) -> str:
        """Return the name of the format."""
        return self.format.name

    def convert(self, row: dict[str, Any], conversion: Conversion) -> list[dict[str, Any]]:
        """Convert a row, under the recipe's mapping, to canonical rows."""
        return self.format.convert(map_columns(row, self.aliases), conversion)


def map_columns(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Return the row under the recipe's mapping {wanted: column in the file}, lists in JSON text parsed."""
    if not columns:
        return read_cells(row)
    moved = set(columns.values())
    kept = {k: v for k, v in row.items() if k not in moved or k in columns}
    return read_cells({**kept, **{w: row.get(c) for w, c in columns.items()}})


def check_mapping(columns: dict[str, str], row: dict[str, Any], where: str) -> None:
    """Check that every mapped column exists.

    Raises:
        DataError: names the missing column and the nearest one.
    """
    for wanted, column in columns.items():
        if column not in row:
            raise DataError(
                f"data.columns.{wanted}: {where} has no column '{column}'{did_you_mean(column, row)} "
                f"(columns: {', '.join(row)})"
            )


def detect(sample: Sequence[dict[str, Any]], rows: str, wanted: str, where: str) -> DetectedFormat:
    """Detect the format of some mapped rows; columns with other names are recognised (`data.formats.aliases`).

    Args:
        sample: first rows of the source.
        rows: row type of the objective.
        wanted: the recipe's `data.format`; `auto` decides by the columns.
        where: place of the first row, for messages.

    Raises:
        DataError: unknown format name, a format that cannot become the row type, or columns that fit none or several.
    """
    accepted = [data_format(name) for name in formats_of(rows)]
    row = sample[0]
    if wanted != "auto":
        named = data_format(wanted)
        if named.name not in [f.name for f in accepted]:
            possible = ", ".join(f.name for f in accepted)
            raise DataError(f"data.format: {wanted} cannot become {rows} rows (possible: {possible})")
        accepted = [named]
    for one in accepted:
        if one.matches(row) is not None and (wanted != "auto" or one.fits(row)):
            return DetectedFormat(one)
    found = recognise(sample, accepted, where, keeps_columns=row_type(rows).keeps_columns)
    if found is None:
        raise DataError(_mismatch(accepted, row, rows, where))
    return DetectedFormat(*found)


def _mismatch(formats: Sequence[DataFormat], row: dict[str, Any], rows: str, where: str) -> str:
    lines = [f"{where}: no {rows} row can be made of the columns {', '.join(row) or '(none)'}."]
    for found in formats:
        lines.append(f"  {found.name:<20} needs {' or '.join('+'.join(c) for c in found.columns[:3])}  ({found.summary})")
    mapping = _nearest_mapping(formats, row)
    if mapping:
        pairs = ", ".join(f"{w}: {c}" for w, c in mapping.items())
        lines.append(f"Nearest: data.columns='{{{pairs}}}'")
    else:
        lines.append("Map columns with data.columns='{wanted: column}', or name the format with data.format.")
    return "\n".join(lines)


def _nearest_mapping(formats: Sequence[DataFormat], row: dict[str, Any]) -> dict[str, str]:
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
