"""Detecting the format of rows, and the message when none matches."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmrecipe.core.errors import DataError, did_you_mean
from llmrecipe.data.formats.aliases import recognise
from llmrecipe.data.formats.data_format import Conversion, DataFormat, data_format, formats_of
from llmrecipe.data.formats.messages import read_cells
from llmrecipe.data.formats.mismatch import another_type, mapping_text, mismatch, takers_of
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


def map_columns(row: dict[str, Any], columns: dict[str, str], sample: bool = False) -> dict[str, Any]:
    """Return the row under the recipe's mapping {wanted: column in the file}, lists in JSON text parsed.

    Args:
        sample: see `read_cells`.

    Raises:
        BadRow: JSON text of the row repeats a key.
    """
    if not columns:
        return read_cells(row, sample)
    moved = set(columns.values())
    kept = {k: v for k, v in row.items() if k not in moved or k in columns}
    return read_cells({**kept, **{w: row.get(c) for w, c in columns.items()}}, sample)


def check_mapping(columns: dict[str, str], row: dict[str, Any], where: str, rows: str) -> None:
    """Check that every mapped column exists.

    Raises:
        DataError: names the missing column and the nearest one, and the mapping that would do.
    """
    for wanted, column in columns.items():
        if column not in row:
            raise DataError(
                f"data.columns.{wanted}: {where} has no column '{column}'{did_you_mean(column, row)} "
                f"(columns: {', '.join(row)}){_right_mapping(columns, [row], rows)}"
            )


def _right_mapping(columns: dict[str, str], sample: Sequence[dict[str, Any]], rows: str) -> str:
    """Say which mapping makes a row type of unmapped rows: the given one turned round, or what their names say."""
    turned = {column: wanted for wanted, column in columns.items()}
    if turned and all(wanted in sample[0] for wanted in columns):
        with contextlib.suppress(DataError):
            detect([map_columns(row, turned, sample=True) for row in sample], rows, "auto", "")
            return f"; it is written the other way round, {{wanted: column in the file}}: {mapping_text(turned)}"
    with contextlib.suppress(DataError):
        aliases = detect(sample, rows, "auto", "").aliases
        return f"; {mapping_text(aliases)} fits" if aliases else "; the columns fit as they are: leave data.columns out"
    return ""


def detect(
    sample: Sequence[dict[str, Any]],
    rows: str,
    wanted: str,
    where: str,
    columns: dict[str, str] | None = None,
    raw: Sequence[dict[str, Any]] = (),
) -> DetectedFormat:
    """Detect the format of some mapped rows; columns with other names are recognised (`data.formats.aliases`).

    Args:
        sample: first rows of the source.
        rows: row type of the objective.
        wanted: the recipe's `data.format`; `auto` decides by the columns.
        where: place of the first row, for messages.
        columns: the recipe's mapping, under which the sample is, and `raw` the sample without it; for messages.

    Raises:
        DataError: unknown format name, a format that cannot become the row type, or columns that fit none or several.
    """
    accepted = [data_format(name) for name in formats_of(rows)]
    row = sample[0]
    if wanted != "auto":
        named = data_format(wanted)
        if named.name not in [f.name for f in accepted]:
            possible = ", ".join(f.name for f in accepted)
            takers = f"; {found}" if (found := takers_of(named)) else ""
            raise DataError(f"data.format: {wanted} cannot become {rows} rows (possible: {possible}){takers}")
        accepted = [named]
    elif (other := another_type(sample, rows, accepted)) is not None:
        raise DataError(mismatch(accepted, row, rows, where, other))
    for one in accepted:
        if one.matches(row) is not None and (wanted != "auto" or one.fits(row)):
            return DetectedFormat(one)
    known = recognise(sample, accepted, where, keeps_columns=row_type(rows).keeps_columns)
    if known is None:
        raise DataError(mismatch(accepted, row, rows, where) + (_right_mapping(columns, raw, rows) if columns else ""))
    return DetectedFormat(*known)
