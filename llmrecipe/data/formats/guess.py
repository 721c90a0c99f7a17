"""What rows are, where no objective says what they are to become: every reading of their columns, the likeliest first."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmrecipe.core import registry
from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.aliases import UnclearColumns, normal_name
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.data_format import Conversion, DataFormat, data_format
from llmrecipe.data.formats.detect import DetectedFormat, detect, map_columns
from llmrecipe.data.formats.mismatch import COMMON, mapping_by_place, mapping_text, nearest_mapping
from llmrecipe.data.formats.splits import Part

Row = dict[str, Any]


@dataclass(frozen=True)
class FormatGuess:
    """One way to read some rows."""

    rows: str
    """The row type they become."""
    found: DetectedFormat
    used: tuple[str, ...]
    """Columns the format needs, in its own names."""
    numbers: bool
    """Whether what the rows are marked with is a number rather than the name of a class."""

    @property
    def fits(self) -> tuple[int, int, bool]:
        """Return how well the columns fit, small for well: columns left unread, renames, a number read as a class."""
        return (-len(self.used), len(self.found.aliases), self.numbers != (self.rows == "scored"))


def readings(part: Part, sample: Sequence[Row], order: Sequence[str], columns: dict[str, str]) -> list[FormatGuess]:
    """Return every way to read some rows, the likeliest first.

    A reading counts where at least one row can be converted. The one that uses most columns comes first, then the one with
    fewest renames; a mark that is a number makes rows to be scored, any other one classes.

    Args:
        part: where the rows come from.
        sample: its first rows.
        order: row types, those first that are preferred where rows can be either.
        columns: the user's mapping {wanted: column in the file}.

    Raises:
        DataError: no row type can be made of them; the message names the nearest formats.
    """
    where = part.reader.name
    mapped = [map_columns(row, columns, sample=True) for row in sample]
    found: list[FormatGuess] = []
    unclear: str | None = None
    for rows in order:
        try:
            detected = detect(mapped, rows, "auto", where)
        except UnclearColumns as error:
            unclear = unclear or str(error)
            continue
        except DataError:
            continue
        named = [map_columns(row, detected.aliases, sample=True) for row in mapped]
        used = detected.format.matches(named[0])
        if used is not None and _converts(detected, rows, part, mapped):
            found.append(FormatGuess(rows, detected, used, _marked_by_numbers(used, named)))
    best = min(found, key=lambda reading: reading.fits, default=None)
    if best is None or (unclear and len(best.used) == 1):
        raise DataError(unclear or _nothing_fits(where, mapped[0]))
    return sorted(found, key=lambda reading: reading.fits)


def _converts(detected: DetectedFormat, rows: str, part: Part, sample: Sequence[Row]) -> bool:
    """Return whether a row of the sample becomes a canonical row; a conversation that nobody answers is a prompt."""
    conversion = Conversion(rows, template=True, base=part.reader.base)
    for row in sample:
        try:
            made = detected.convert(row, conversion)
            if any("messages" not in one or any(m["role"] == "assistant" for m in one["messages"]) for one in made):
                return True
        except (BadRow, DataError, KeyError, TypeError, AttributeError, ValueError):
            continue
    return False


def _marked_by_numbers(used: Sequence[str], named: Sequence[Row]) -> bool:
    """Return whether rows have a score, or a label with decimal places; whole numbers as labels number classes."""
    if "score" in used:
        return True
    labels = [row.get("label") for row in named] if "label" in used else []
    return any(_has_places(label) for label in labels) and all(_number(label) is not None for label in labels)


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        return None


def _has_places(value: object) -> bool:
    number = _number(value)
    return number is not None and number % 1 != 0


def _nothing_fits(where: str, row: Row) -> str:
    """Return the message for columns that no format has: the nearest ones, and how columns are named."""
    formats = [data_format(name) for name in registry.names("format")]
    nearest = nearest_mapping(formats, row)
    named = {normal_name(column): column for column in row}

    def rank(one: DataFormat) -> tuple[float, int, int]:
        shares = (sum(c in named for c in columns) / len(columns) for columns in one.columns)
        usual = COMMON.index(one.name) if one.name in COMMON else len(COMMON)
        return -max(shares), abs(len(one.columns[0]) - len(row)), usual

    shared = sorted(formats, key=rank)
    lines = [f"{where}: no data format has the columns {', '.join(map(str, row)) or '(none)'}."]
    if nearest:
        lines.append(f"Nearest: {mapping_text(nearest)}")
    lines += [f"  {one.name:<20} needs {'+'.join(one.columns[0])}  ({one.summary})" for one in shared[:6]]
    placed = mapping_by_place(formats, row) if not nearest else {}
    example = shlex.quote(",".join(f"{wanted}={own}" for wanted, own in placed.items())) if placed else "WANTED=YOURS,..."
    lines.append(f"Say which columns they are: --columns {example}; `llmrecipe docs data` lists every format.")
    return "\n".join(lines)
