"""Finding out which format rows have, and the message when they have none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmrecipe.core.errors import DataError, did_you_mean
from llmrecipe.data.formats.aliases import ALIASES, recognise
from llmrecipe.data.formats.convert import FORMATS, Format, Options
from llmrecipe.data.formats.messages import read_cells
from llmrecipe.data.formats.row_types import row_type


@dataclass(frozen=True)
class Layout:
    """The format of some rows, and what their columns are called instead of its own."""

    format: Format
    aliases: dict[str, str] = field(default_factory=dict)
    """Recognised columns: wanted -> column."""

    @property
    def name(self) -> str:
        """Name of the format."""
        return self.format.name

    def convert(self, row: dict[str, Any], options: Options) -> list[dict[str, Any]]:
        """Canonical rows of a row under the recipe's mapping."""
        return self.format.convert(rename(row, self.aliases), options)


def rename(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The row under the recipe's mapping {wanted: column in the file}, lists in JSON text read."""
    if not columns:
        return read_cells(row)
    moved = set(columns.values())
    kept = {k: v for k, v in row.items() if k not in moved or k in columns}
    return read_cells({**kept, **{w: row.get(c) for w, c in columns.items()}})


def check_mapping(columns: dict[str, str], row: dict[str, Any], where: str) -> None:
    """Every mapped column must exist.

    Raises:
        DataError: names the missing column and the nearest one.
    """
    for wanted, column in columns.items():
        if column not in row:
            raise DataError(
                f"data.columns.{wanted}: {where} has no column '{column}'{did_you_mean(column, row)} "
                f"(columns: {', '.join(row)})"
            )


def detect(sample: Sequence[dict[str, Any]], rows: str, wanted: str, where: str) -> Layout:
    """The format of some mapped rows; columns that go by other names are recognised (`data.formats.aliases`).

    Args:
        sample: first rows of the source.
        rows: row type of the objective.
        wanted: the recipe's `data.format`; `auto` decides by the columns.
        where: place of the first row, for messages.

    Raises:
        DataError: unknown format name, a format that cannot become the row type, or columns that fit none or several.
    """
    accepted = row_type(rows).formats
    row = sample[0]
    if wanted != "auto":
        if wanted not in FORMATS:
            known = ", ".join(FORMATS)
            raise DataError(f"data.format: there is no format '{wanted}'{did_you_mean(wanted, FORMATS)} (known: auto, {known})")
        if wanted not in accepted:
            raise DataError(f"data.format: {wanted} cannot become {rows} rows (possible: {', '.join(accepted)})")
        accepted = (wanted,)
    for name in accepted:
        if FORMATS[name].matches(row) is not None and (wanted != "auto" or _fits(name, row)):
            return Layout(FORMATS[name])
    found = recognise(sample, accepted, where, keeps_columns=rows == "prompt")
    if found is None:
        raise DataError(_mismatch(accepted, row, rows, where))
    return Layout(FORMATS[found[0]], found[1])


def _fits(name: str, row: dict[str, Any]) -> bool:
    """Tells formats apart that share columns."""
    value = row.get("messages", row.get("conversations"))
    first = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else {}
    if name == "messages":
        return "from" not in first
    if name == "sharegpt":
        return "from" in first
    if name == "preference_implicit":
        return "prompt" not in row
    if name == "alpaca":
        return "prompt" not in row or "completion" not in row
    return True


def _mismatch(names: Sequence[str], row: dict[str, Any], rows: str, where: str) -> str:
    lines = [f"{where}: no {rows} row can be made of the columns {', '.join(row) or '(none)'}."]
    for name in names:
        found = FORMATS[name]
        lines.append(f"  {name:<20} needs {' or '.join('+'.join(c) for c in found.columns[:3])}  ({found.doc})")
    mapping = _nearest_mapping(names, row)
    if mapping:
        pairs = ", ".join(f"{w}: {c}" for w, c in mapping.items())
        lines.append(f"Nearest: data.columns='{{{pairs}}}'")
    else:
        lines.append("Map columns with data.columns='{wanted: column}', or name the format with data.format.")
    return "\n".join(lines)


def _nearest_mapping(names: Sequence[str], row: dict[str, Any]) -> dict[str, str]:
    """The mapping that completes a format with columns of the row, fewest renames first."""
    best: dict[str, str] = {}
    for name in names:
        for columns in FORMATS[name].columns:
            mapping: dict[str, str] = {}
            for wanted in columns:
                if wanted in row:
                    continue
                column = _similar(wanted, [c for c in row if c not in mapping.values() and c not in columns])
                if column is None:
                    break
                mapping[wanted] = column
            else:
                best = mapping if not best or len(mapping) < len(best) else best
    return best


def _similar(wanted: str, columns: list[str]) -> str | None:
    lowered = {c.lower(): c for c in columns}
    for synonym in ALIASES.get(wanted, ()):
        if synonym in lowered:
            return lowered[synonym]
    near = did_you_mean(wanted, lowered)
    return lowered[near.split("'")[1]] if near else None
