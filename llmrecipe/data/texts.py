"""The texts of a split, before any tokenizer: what a tokenizer is trained on, and what it is tried on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.data_format import Conversion
from llmrecipe.data.formats.detect import map_columns
from llmrecipe.data.formats.messages import drop_fields
from llmrecipe.data.formats.sources import HubStream
from llmrecipe.data.formats.splits import NoSplitError, Part, open_split
from llmrecipe.data.tokenize_split import source_layout
from llmrecipe.recipe.data_section import DataSection

NO_TEXT = frozenset({"attributes", "columns", "features", "image", "kwargs", "label", "role", "score", "task", "tools", "type"})
"""Keys of canonical rows and of messages whose values are no text that is tokenized."""


def parts_of(data: DataSection, split: str) -> list[Part]:
    """Return the sources of a split; none where the recipe has no such split."""
    try:
        return open_split(data, split)
    except NoSplitError:
        if split == "train":
            raise
        return []


def texts_of(parts: Sequence[Part], data: DataSection, kind: str, rows: int | None = None) -> Iterator[str]:
    """Yield every text that an objective reads of these sources; rows that cannot be used are passed over.

    Args:
        kind: row type of the objective.
        rows: at most this many raw rows of each source, evenly spaced (the first ones of a stream); None reads all.

    Raises:
        DataError: columns that fit no format, or a stream of unknown length without `rows`.
    """
    for part in parts:
        layout = source_layout(part, data, kind)
        conversion = Conversion(kind, template=True, spoken=True, system=data.system, base=part.reader.base)
        for row in _rows(part, rows):
            try:
                named = drop_fields(map_columns(row, data.columns), data.drop_fields)
                for canonical in layout.convert(named, conversion):
                    yield from _strings(canonical)
            except (BadRow, KeyError, TypeError, AttributeError, ValueError):
                continue


def _rows(part: Part, most: int | None) -> Iterator[dict[str, Any]]:
    if isinstance(part.reader, HubStream):
        if most is None:
            raise DataError(f"tokenizer.train.rows: {part.reader.name} is a stream without an end; say how many rows to read")
        yield from islice((row for _, row in part.reader.stream() if part.chosen(row)), most)
        return
    count = len(part.reader)
    if most is None or most >= count:
        yield from (row for _, row in part.reader.stream() if part.chosen(row))
        return
    yield from (row for i in range(most) for row in part.reader.rows([i * count // most]) if part.chosen(row))


def _strings(value: object) -> Iterator[str]:
    """Yield the strings inside a canonical row, except those that are no text."""
    if isinstance(value, str):
        if value:
            yield value
    elif isinstance(value, dict):
        yield from (text for key, inner in value.items() if key not in NO_TEXT for text in _strings(inner))
    elif isinstance(value, list):
        yield from (text for inner in value for text in _strings(inner))
