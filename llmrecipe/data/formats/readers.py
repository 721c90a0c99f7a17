"""Reading one file: JSON lines, JSON, CSV, Parquet, Arrow, plain text; each also packed with gzip or zip.

Each reader has random access (`rows`), a length, a content hash and `where(i)`, the location for messages. A damaged file is
an error that names file and line; nothing is skipped silently.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrecipe.core.errors import DataError
from llmrecipe.core.file_hashes import file_hash
from llmrecipe.core.foreign import DuplicateKey, once, parse_json, reason_of
from llmrecipe.data.formats.arrow_sizes import arrow_unpacked
from llmrecipe.data.formats.bounds import BOUNDS, Bounds
from llmrecipe.data.formats.file_content import (
    BOM,
    EXTENSIONS,
    content_kind,
    content_of,
    first_sign,
    not_utf8,
    refuse_repeated,
    suffix_kind,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import FileMetaData

Row = dict[str, Any]


class Reader:
    """Rows of one file or table."""

    name: str
    base: Path | None = None
    """Folder that relative paths inside rows refer to."""
    ignored: Sequence[str] = ()
    """Other files of its folder that hold no rows of the split."""

    def __len__(self) -> int:
        raise NotImplementedError

    def rows(self, indices: Sequence[int] | range) -> list[Row]:
        """Return the raw rows at these indices."""
        raise NotImplementedError

    def where(self, index: int) -> str:
        """Return the location of a row, for messages."""
        return f"{self.name} row {index + 1}"

    def source(self, index: int) -> str:
        """Return the file or hub data set of a row."""
        return self.name

    def sources(self) -> list[str]:
        """Return the files or the hub data set of all rows."""
        return [self.name]

    def fingerprint(self, remember: bool = False) -> str:
        """Return a hash of the content.

        Args:
            remember: keep that of a file in the cache, so that the next start need not read all of it.
        """
        raise NotImplementedError

    def stream(self) -> Iterator[tuple[int, Row]]:
        """Yield rows one after the other, without reading the whole file first where the format allows it."""
        for index in range(len(self)):
            yield index, self.rows([index])[0]


def _file_hash(path: Path, remember: bool) -> str:
    found = file_hash(path)
    return found.remember() if remember else found.sha256


def open_file(path: Path, bounds: Bounds = BOUNDS) -> Reader:
    """Return the reader for a file, by its content (`data.formats.file_content`), and for text by its name.

    Raises:
        DataError: unknown kind, empty or damaged file.
    """
    if not path.stat().st_size:
        raise DataError(f"{path}: the file is empty")
    data, name = content_of(path, bounds)
    kind = content_kind(data, suffix_kind(name))
    if kind not in EXTENSIONS:
        raise DataError(
            f"{path}: cannot read '{kind or 'no extension'}' files; known: {', '.join(EXTENSIONS)} (also .gz, .zip)"
        )
    if kind in (".jsonl", ".ndjson", ".json"):
        if kind == ".json" and (first_sign(data) == b"[" or _spread(data)):
            return ListFile(path, data)
        return LinesFile(path, data, bounds)
    if kind in (".txt", ".text"):
        return TextFile(path, data, bounds)
    if kind == ".conll":
        return WordsFile(path, data, bounds)
    return TableFile(path, kind, data, bounds)


def _line_starts(data: bytes | mmap.mmap) -> np.ndarray:
    """Return the offsets at which lines begin, with the end of the data as the last entry."""
    view = np.frombuffer(data, dtype=np.uint8)
    step = 1 << 26
    ends = [np.flatnonzero(view[at : at + step] == 10) + at + 1 for at in range(0, len(view), step)]
    starts = np.concatenate([np.zeros(1, dtype=np.int64), *ends])
    return starts if starts[-1] == len(view) else np.append(starts, len(view))


def _decode(data: bytes, path: Path, line: int) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error, f"{path}:{line}") from error


def _spread(data: bytes | mmap.mmap) -> bool:
    """Return whether the first line with a text begins an object that does not end in it."""
    head = bytes(data[:4096]).removeprefix(BOM).lstrip()
    return head[:1] == b"{" and b"\n" in head and not head.partition(b"\n")[0].rstrip().endswith(b"}")


class LinesFile(Reader):
    """JSON lines: one object per line, blank lines allowed."""

    def __init__(self, path: Path, data: bytes | mmap.mmap, bounds: Bounds = BOUNDS) -> None:
        self.name, self.path, self.base, self.data, self.bounds = str(path), path, path.parent, data, bounds
        self._starts: np.ndarray | None = None
        self._lines: np.ndarray | None = None

    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the line offsets, and the numbers (from 0) of the lines with a row."""
        if self._starts is None or self._lines is None:
            self._starts = _line_starts(self.data)
            lengths = np.diff(self._starts)
            if len(lengths) and int(lengths.max()) > self.bounds.line:
                self.bounds.check_line(int(lengths.max()), f"{self.path}:{int(lengths.argmax()) + 1}")
            full = lengths > 8
            for i in np.flatnonzero(~full):
                full[i] = bool(self.data[self._starts[i] : self._starts[i + 1]].strip())
            self._lines = np.flatnonzero(full)
        return self._starts, self._lines

    def __len__(self) -> int:
        return len(self._index()[1])

    def where(self, index: int) -> str:
        """Return file and line."""
        return f"{self.path}:{int(self._index()[1][index]) + 1}"

    def rows(self, indices: Sequence[int] | range) -> list[Row]:
        """Parse the lines at these indices."""
        starts, lines = self._index()
        return [self._parse(self.data[starts[n] : starts[n + 1]], int(n) + 1) for n in (lines[i] for i in indices)]

    def _parse(self, data: bytes, line: int) -> Row:
        text = _decode(data, self.path, line)
        try:
            row = parse_json(text, unique=True)
        except json.JSONDecodeError as error:
            cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
            hint = "; the line was cut off, the file is incomplete" if cut else ""
            raise DataError(f"{self.path}:{line}: not valid JSON ({error.msg}, column {error.colno}){hint}") from error
        except DuplicateKey as error:
            raise DataError(f"{self.path}:{line}: {error}; keep one, or rename the others") from error
        except ValueError as error:
            raise DataError(f"{self.path}:{line}: JSON that is not read: {error}") from error
        if not isinstance(row, dict):
            raise DataError(
                f'{self.path}:{line}: a row must be an object like {{"text": "..."}}, this is a {type(row).__name__}'
            )
        return row

    def fingerprint(self, remember: bool = False) -> str:
        """Return a hash of the text."""
        if isinstance(self.data, mmap.mmap):
            return _file_hash(self.path, remember)
        return hashlib.sha256(self.data).hexdigest()

    def stream(self) -> Iterator[tuple[int, Row]]:
        """Yield row after row."""
        index = 0
        with io.BytesIO(self.data) if isinstance(self.data, bytes) else self.path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(self.bounds.line + 1), b""), start=1):
                self.bounds.check_line(len(line), f"{self.path}:{number}")
                if line.strip():
                    yield index, self._parse(line, number)
                    index += 1


class ListFile(Reader):
    """A JSON file with one array of objects, or with one object over several lines."""

    def __init__(self, path: Path, data: bytes | mmap.mmap) -> None:
        self.name, self.path, self.base = str(path), path, path.parent
        raw = bytes(data)
        self._hash = hashlib.sha256(raw).hexdigest()
        try:
            found = parse_json(raw, unique=True)
        except DuplicateKey as error:
            raise DataError(f"{path}:{_line_of_duplicate(raw)}: {error}; keep one, or rename the others") from error
        except ValueError as error:
            line = getattr(error, "lineno", 1)
            raise DataError(f"{path}:{line}: not valid JSON ({getattr(error, 'msg', error)})") from error
        self._rows: list[Row] = found if isinstance(found, list) else [found]
        bad = next((i for i, row in enumerate(self._rows) if not isinstance(row, dict)), None)
        if bad is not None:
            raise DataError(f"{path} row {bad + 1}: a row must be an object, this is a {type(self._rows[bad]).__name__}")

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, indices: Sequence[int] | range) -> list[Row]:
        """Return the objects at these indices."""
        return [self._rows[i] for i in indices]

    def fingerprint(self, remember: bool = False) -> str:
        """Return a hash of the text."""
        return self._hash


def _line_of_duplicate(raw: bytes) -> int:
    """Return the line at which the first row of a JSON array begins in which a key is repeated."""
    text = raw.decode("utf-8-sig")
    if not text.lstrip().startswith("["):
        return 1
    decoder = json.JSONDecoder(object_pairs_hook=once)
    at = text.index("[") + 1
    try:
        while True:
            at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n,"))
            at = decoder.raw_decode(text, at)[1]
    except ValueError:
        return text.count("\n", 0, at) + 1


class TextFile(Reader):
    """Plain text: rows are the blocks between blank lines, each as `{"text": block}`."""

    def __init__(self, path: Path, data: bytes | mmap.mmap, bounds: Bounds = BOUNDS) -> None:
        self.name, self.path, self.base = str(path), path, path.parent
        self._hash = hashlib.sha256(data).hexdigest()
        self._blocks: list[tuple[int, str]] = []
        block: list[str] = []
        first = 1
        # Line ends of old systems are a carriage return alone.
        lines = bytes(data).replace(b"\r", b"\n") if data.find(b"\n") < 0 else data
        for number, line in enumerate([*io.BytesIO(lines), b"\n"], start=1):
            bounds.check_line(len(line), f"{path}:{number}")
            text = _decode(line, path, number).rstrip("\r\n")
            if text.strip():
                first = first if block else number
                block.append(text)
            elif block:
                self._blocks.append((first, "\n".join(block)))
                block = []

    def __len__(self) -> int:
        return len(self._blocks)

    def where(self, index: int) -> str:
        """Return file and first line of the block."""
        return f"{self.path}:{self._blocks[index][0]}"

    def rows(self, indices: Sequence[int] | range) -> list[Row]:
        """Return the blocks at these indices."""
        return [{"text": self._blocks[i][1]} for i in indices]

    def fingerprint(self, remember: bool = False) -> str:
        """Return a hash of the text."""
        return self._hash


class WordsFile(TextFile):
    """CoNLL's columns: a word a line, its tag in the last column, blank lines between sentences.

    Rows are `{"tokens": [...], "tags": [...]}`; lines that begin with `-DOCSTART-` or `#` are left out.
    """

    def __init__(self, path: Path, data: bytes | mmap.mmap, bounds: Bounds = BOUNDS) -> None:
        super().__init__(path, data, bounds)
        kept = [(first, self._lines(block)) for first, block in self._blocks]
        self._blocks = [(first, "\n".join(lines)) for first, lines in kept if lines]
        for first, lines in kept:
            if bare := next((line for line in lines if len(line.split()) < 2), None):
                raise DataError(f"{path}:{first}: '{bare:.40}' has no tag; each line holds a word and, last, its tag")

    @staticmethod
    def _lines(block: str) -> list[str]:
        return [line for line in block.split("\n") if not line.startswith(("-DOCSTART-", "#"))]

    def rows(self, indices: Sequence[int] | range) -> list[Row]:
        """Return the sentences at these indices."""
        found = [[line.split() for line in self._blocks[i][1].split("\n")] for i in indices]
        return [{"tokens": [cells[0] for cells in words], "tags": [cells[-1] for cells in words]} for words in found]


class TableFile(Reader):
    """CSV, TSV, Parquet or Arrow, read with pyarrow."""

    def __init__(self, path: Path, kind: str, data: bytes | mmap.mmap, bounds: Bounds = BOUNDS) -> None:
        self.name, self.path, self.base = str(path), path, path.parent
        self.table = _read_table(path, kind, data, bounds)
        refuse_repeated(self.table.column_names, str(path))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def rows(self, indices: Sequence[int] | range) -> list[Row]:
        """Return rows as dicts; a contiguous range is one slice."""
        if isinstance(indices, range) and indices.step == 1:
            return without_fillers(self.table.slice(indices.start, len(indices)).to_pylist())
        return without_fillers(self.table.take(list(indices)).to_pylist())

    def fingerprint(self, remember: bool = False) -> str:
        """Return a hash of the file."""
        return _file_hash(self.path, remember)


def without_fillers(rows: list[Row]) -> list[Row]:
    """Remove the nulls inside nested values: Arrow gives each mapping of a column the keys of all others."""
    return [{name: _filled(value) for name, value in row.items()} for row in rows]


def _filled(value: object) -> object:
    if isinstance(value, dict):
        return {k: _filled(v) for k, v in value.items() if v is not None}
    if isinstance(value, list) and isinstance(next((v for v in value if v is not None), None), dict | list):
        return [_filled(v) for v in value]
    return value


def _read_table(path: Path, kind: str, data: bytes | mmap.mmap, bounds: Bounds) -> pa.Table:
    import pyarrow as pa
    from pyarrow import parquet

    from llmrecipe.data.formats.csv_file import read_csv

    try:
        if kind == ".parquet":
            place = pa.BufferReader(data) if isinstance(data, bytes) else path
            bounds.check_unpacked(_unpacked(parquet.read_metadata(place)), path)
            return parquet.ParquetFile(place, memory_map=True).read()
        if kind in (".arrow", ".feather"):
            table = _read_arrow(path, data, bounds)
            table.slice(0, 1).take([0] * min(table.num_rows, 1))  # refuses a type whose rows cannot be picked
            return table
        return read_csv(path, bytes(data), kind)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: the file is damaged or not {kind[1:]} ({reason_of(error)}); write it again") from error


def _read_arrow(path: Path, data: bytes | mmap.mmap, bounds: Bounds) -> pa.Table:
    """Read an Arrow file, or a stream; compressed buffers say how large they are before they are unpacked."""
    import pyarrow as pa

    source = pa.BufferReader(data) if isinstance(data, bytes) else pa.memory_map(str(path))
    is_file = data[:6] == b"ARROW1"
    source.seek(8 if is_file else 0)
    size = 0
    for message in pa.ipc.MessageReader.open_stream(source):
        size += arrow_unpacked(message)
        bounds.check_unpacked(size, path)
    source.seek(0)
    return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source).read_all()


def _unpacked(facts: FileMetaData) -> int:
    """Return the bytes of a Parquet file's values in memory, at least: repeated values are stored once."""
    groups = [facts.row_group(i) for i in range(facts.num_row_groups)]
    return max(sum(int(group.total_byte_size) for group in groups), int(facts.num_rows) * int(facts.num_columns))
