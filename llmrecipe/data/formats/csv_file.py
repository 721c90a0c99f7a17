"""Reading CSV: its delimiter, its quotes, its encoding, and which of its columns are numbers.

A header line is needed; it tells the delimiter. What a lenient reader would change in silence (a quote inside a quoted value
that is not doubled, text in another encoding) is an error that names the line.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv

from llmrecipe.core.errors import DataError
from llmrecipe.data.formats.file_content import not_utf8, refuse_repeated

NUMERIC = frozenset({"label", "labels", "score", "margin", "input_ids"})
"""Columns that are numbers (or true and false) where all their cells are; others stay text, so that '007' keeps its zeros."""
NULLS = ("", "NA", "N/A", "n/a", "#N/A", "NULL", "null", "None", "<NA>")
"""Cells that stand for no value in a column of numbers."""
MARKS = (",", "\t", ";", "|")
"""Delimiters that are looked for in the header."""
SEPARATOR = re.compile(rb"(?:\xef\xbb\xbf)?sep=(.)(?:\r\n?|\n)")
"""First line by which spreadsheets say what the delimiter is."""
NAMED = r"^-?0\d+$"
"""A number that is a name rather than a quantity, for its zeros would be lost."""


def read_csv(path: Path, content: bytes, kind: str) -> pa.Table:
    """Read CSV with a header line, which tells the delimiter; pyarrow's number of a damaged row becomes file:line.

    Raises:
        DataError: another encoding, a column that is there two times, a row of another length, or quotes that are not closed.
    """
    _check_encoding(content, path)
    if not content.strip():
        raise DataError(f"{path}: there are no rows")
    given = SEPARATOR.match(content)
    content = content[given.end() :] if given else content
    delimiter = given[1].decode() if given else _delimiter(content, "\t" if kind == ".tsv" else ",")
    header = _header(content, delimiter)
    refuse_repeated([name for name in header if name], f"{path}:1")
    _check_quotes(content, delimiter, path)
    damaged: list[tuple[int, int, int]] = []

    def note(row: arrow_csv.InvalidRow) -> str:
        damaged.append((row.number or 0, row.expected_columns, row.actual_columns))
        return "skip"

    table = arrow_csv.read_csv(
        io.BytesIO(content),
        # A row is read from one block, however long it is.
        read_options=arrow_csv.ReadOptions(use_threads=False, block_size=min(len(content), 1 << 30)),
        parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note),
        convert_options=arrow_csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string())),
    )
    if damaged:
        number, expected, found = damaged[0]
        raise DataError(
            f"{path}:{number}: {found} columns where the header has {expected}; quote commas and line breaks in values"
        )
    return _with_numbers(_named(table))


def _check_encoding(content: bytes, path: Path) -> None:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        start = content.rfind(b"\n", 0, error.start) + 1
        line = content.count(b"\n", 0, error.start) + 1
        raise not_utf8(error, f"{path}:{line}", start) from error


def _lines(content: bytes) -> io.TextIOWrapper:
    """Return the lines of some content with their line ends, whichever they are."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="")


def _header(content: bytes, delimiter: str) -> list[str]:
    """Return the names of the first line that is not empty; one name where it cannot be read."""
    try:
        return next((row for row in csv.reader(_lines(content), delimiter=delimiter) if row), [""])
    except csv.Error:
        return [""]


def _delimiter(content: bytes, known: str) -> str:
    """Return the first delimiter that makes more than one column of the header."""
    return next((mark for mark in (known, *MARKS) if len(_header(content, mark)) > 1), known)


def _check_quotes(content: bytes, delimiter: str, path: Path) -> None:
    """Refuse a value that goes on after its closing quote, or whose quote is never closed.

    Raises:
        DataError: it names the line.
    """
    view = np.frombuffer(content, dtype=np.uint8)
    quotes = np.flatnonzero(view == ord('"'))
    around = np.frombuffer(b'"\r\n' + delimiter.encode(), dtype=np.uint8)
    ends, starts = quotes[1::2] + 1, quotes[0::2] - 1
    closed = np.isin(view[ends[ends < len(view)]], around).all() and np.isin(view[starts[starts >= 0]], around).all()
    if len(quotes) % 2 == 0 and closed:
        return
    # Quotes inside of values without quotes are text: what decides is a reader that keeps to the rules.
    limit = csv.field_size_limit(sys.maxsize)
    rows = csv.reader(_lines(content), delimiter=delimiter, strict=True)
    try:
        for _ in rows:
            pass
    except csv.Error as error:
        raise DataError(
            f"{path}:{rows.line_num}: a value goes on after its closing quote, or is never closed ({error}); write a quote "
            'inside of a quoted value twice ("")'
        ) from error
    finally:
        csv.field_size_limit(limit)


def _named(table: pa.Table) -> pa.Table:
    """Return the table without columns that have neither a name nor a value, as spreadsheets leave them at the end."""
    empty = [
        i for i, name in enumerate(table.column_names) if not name and not pc.any(pc.not_equal(table.column(i), "")).as_py()
    ]
    kept = [i for i in range(table.num_columns) if i not in empty]
    return table.select(kept) if empty else table


def _with_numbers(table: pa.Table) -> pa.Table:
    for i, name in enumerate(table.column_names):
        if name in NUMERIC:
            table = table.set_column(i, name, _numbers(table.column(i)))
    return table


def _numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of texts as whole numbers, numbers, or true and false, whichever its cells all are; else as it is."""
    filled = pc.if_else(pc.is_in(column, value_set=pa.array(NULLS)), pa.scalar(None, pa.string()), column)
    named = pc.any(pc.match_substring_regex(filled, NAMED)).as_py()
    for kind in () if named else (pa.int64(), pa.float64(), pa.bool_()):
        try:
            return filled.cast(kind)
        except pa.ArrowInvalid:
            continue
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
