"""The token cache: Arrow files read memory-mapped, keyed by content.

The key is a hash of what determines the token rows and of nothing else: the content of the data, the tokenizer with its
template, the row type and mask, the length options, the split or sample, and the code that encodes. A table is written under
a temporary name and then renamed, so a reader never sees half of one and two writers do not disturb each other. Its checksums
are verified when it is opened; a damaged table is removed and built again. Old tables are removed when a new one is written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from bisect import bisect_right
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from llmrecipe.core.cache_sweep import LOCK, UNFINISHED, mark_used, sweep
from llmrecipe.core.errors import DataError
from llmrecipe.core.file_hashes import file_hash, sha256_of
from llmrecipe.core.file_lock import hold
from llmrecipe.core.foreign import parse_json
from llmrecipe.core.paths import cache_root
from llmrecipe.data.tokenize.row_type import RowType

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.data.features.table import FeatureTable

FILE, FACTS = "rows.arrow", "facts.json"

logger = logging.getLogger("llmrecipe")


def table_key(ingredients: dict[str, Any]) -> str:
    """Return the key of a table: the hash of its ingredients, independent of their order."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True, default=str).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of all of a tokenizer that determines ids: vocabulary, merges, rules, special tokens, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        text = backend.to_str()
        text = text[max(text.find('"added_tokens"'), 0) :]  # before it are padding and truncation of the last call
    else:
        text = json.dumps([sorted(tokenizer.get_vocab().items()), type(tokenizer).__name__])
    rest = [
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        getattr(tokenizer, "init_kwargs", {}).get("llmrecipe_template"),
    ]
    return hashlib.sha256((text + json.dumps(rest, sort_keys=True, default=str)).encode()).hexdigest()


def keep_picture(content: bytes) -> Path:
    """Store bytes in a file of the cache, named by their hash, and return its path."""
    path = cache_root() / "pictures" / hashlib.sha256(content).hexdigest()
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        aside.write_bytes(content)
        aside.rename(path)
    return path


def schema_of(kind: RowType) -> pa.Schema:
    """Return the Arrow schema of a row type's token rows."""
    import pyarrow as pa

    types = {"float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_(), "string": pa.string()}
    fields = [pa.field(name, pa.list_(pa.int32())) for name in kind.lists]
    fields += [pa.field(name, pa.list_(pa.uint8())) for name in kind.masks]
    fields += [pa.field(name, pa.list_(pa.float64())) for name in kind.weights]
    fields += [pa.field(name, types[type_name]) for name, type_name in kind.scalars]
    return pa.schema([*fields, pa.field("source_row", pa.int64())])


def to_batch(columns: dict[str, list[Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Return columns of Python lists as one Arrow record batch."""
    import pyarrow as pa

    return pa.record_batch([_array(columns[f.name], f.type) for f in schema], schema=schema)


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Build an Arrow array, calling `pa.array`, which imports pandas (0.3 s at start-up), only where it is needed."""
    import pyarrow as pa

    if all(v is None for v in values):
        return pa.nulls(len(values), kind)
    if any(v is None for v in values):
        return pa.array(values, type=kind)
    if pa.types.is_integer(kind):
        return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.array(values, kind.to_pandas_dtype()))])
    if pa.types.is_list(kind) and pa.types.is_integer(kind.value_type):
        flat = np.fromiter(chain.from_iterable(values), kind.value_type.to_pandas_dtype())
        ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
        inner = pa.Array.from_buffers(kind.value_type, len(flat), [None, pa.py_buffer(flat)])
        return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(ends)], children=[inner])
    return pa.array(values, type=kind)


def _numbers(array: pa.Array) -> np.ndarray:
    """Return the numbers of an array without nulls, not copied; `to_numpy` would import pandas (0.3 s and 40 MB)."""
    data, dtype = array.buffers()[1], np.dtype(str(array.type))
    if data is None:
        return np.zeros(len(array), dtype)
    return np.frombuffer(data, dtype, count=len(array), offset=array.offset * dtype.itemsize)


class TokenTable:
    """Token rows of one key, read from the memory-mapped file.

    Lists are sliced out of the record batches' own buffers; nothing is copied until a row is read.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch], kind: RowType, facts: dict[str, Any]) -> None:
        self.kind, self.facts = kind, facts
        self.content = ""
        """Hash of the source's content, of the files its rows name too."""
        self.folder: Path | None = None
        """Where it is kept; None in memory."""
        self.features: FeatureTable | None = None
        """The files its rows name, prepared; None where rows name none."""
        self.batches = [_Batch(b) for b in batches if b.num_rows]
        self._starts = [0]
        for batch in self.batches:
            self._starts.append(self._starts[-1] + batch.rows)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        part = bisect_right(self._starts, index) - 1
        row = self.batches[part].row(index - self._starts[part])
        if self.features is not None:
            row["features"] = self.features.of(row["features"])
        return row

    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each row, over all its id columns, (rows,)."""
        names = [n for n in self.kind.lists if n not in self.kind.uncounted]
        parts = [batch.lengths(names) for batch in self.batches]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def column(self, name: str) -> list[Any]:
        """Return a whole column of texts, numbers or lists of numbers; None where a row has no value."""
        return [value for batch in self.batches for value in batch.column(name)]


class _Batch:
    """One record batch, as offsets and values."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        import pyarrow as pa

        self.rows = batch.num_rows
        self.lists: dict[str, tuple[np.ndarray, np.ndarray, bool]] = {}
        self.scalars: dict[str, pa.Array] = {}
        for name, column in zip(batch.schema.names, batch.columns):
            if pa.types.is_list(column.type):
                self.lists[name] = (_numbers(column.offsets), _numbers(column.values), column.null_count == self.rows)
            else:
                self.scalars[name] = column

    def row(self, index: int) -> dict[str, Any]:
        """Return one row as Python lists and scalars; empty optional columns are left out."""
        found: dict[str, Any] = {}
        for name, (offsets, values, missing) in self.lists.items():
            if not missing:
                found[name] = values[offsets[index] : offsets[index + 1]].tolist()
        for name, column in self.scalars.items():
            value = column[index].as_py()
            if value is not None:
                found[name] = value
        return found

    def column(self, name: str) -> list[Any]:
        """Return one column as Python values."""
        if name in self.scalars:
            found: list[Any] = self.scalars[name].to_pylist()
            return found
        offsets, values, _ = self.lists[name]
        return [values[start:end].tolist() for start, end in pairwise(offsets)]

    def lengths(self, names: Sequence[str]) -> np.ndarray:
        """Return the number of tokens of each row over some columns, (rows,)."""
        return sum((np.diff(self.lists[n][0]).astype(np.int64) for n in names), np.zeros(self.rows, dtype=np.int64))


class TableWriter:
    """Collects record batches of a table and writes it atomically.

    Args:
        folder: where to write the table; None keeps it in memory.
    """

    def __init__(self, kind: RowType, folder: Path | None) -> None:
        self.kind, self.folder, self.schema = kind, folder, schema_of(kind)
        self.batches: list[pa.RecordBatch] = []
        self._aside = None if folder is None else folder.with_name(f"{folder.name}.{uuid.uuid4().hex}{UNFINISHED}")
        self._file: Any = None
        self._lock: TextIO | None = None

    def add(self, batch: pa.RecordBatch) -> None:
        """Append a batch."""
        import pyarrow as pa

        if self._aside is None:
            self.batches.append(batch)
            return
        try:
            if self._file is None:
                self._aside.mkdir(parents=True)
                self._lock = hold(self._aside / LOCK, f"{self._aside}: another process writes it")
                self._file = pa.ipc.new_file(str(self._aside / FILE), self.schema)
            self._file.write_batch(batch)
        except OSError as error:
            self.abandon()
            raise _no_room(self._aside, error) from error

    def finish(self, facts: dict[str, Any]) -> TokenTable:
        """Close the table, rename it to its final name, and open it."""
        if self._aside is None or self.folder is None:
            return TokenTable(self.batches, self.kind, facts)
        try:
            if self._file is None:
                self.add(to_batch({name: [] for name in self.schema.names}, self.schema))
            self._file.close()
            self._file = None
            content = {"facts": facts, "facts_sha256": table_key(facts), "rows_sha256": file_hash(self._aside / FILE).sha256}
            (self._aside / FACTS).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
            for name in (FILE, FACTS):
                with (self._aside / name).open("rb") as file:
                    os.fsync(file.fileno())
            self._unlock()
        except OSError as error:
            self.abandon()
            raise _no_room(self._aside, error) from error
        try:
            self._aside.rename(self.folder)
        except OSError as error:  # another process was first; its table is the same
            if (found := open_table(self.folder, self.kind)) is None:
                self.abandon()
                raise _no_room(self._aside, error) from error
            self.abandon()
            return found
        found = open_table(self.folder, self.kind)
        assert found is not None, "a table that was just written is intact"
        return found

    def abandon(self) -> None:
        """Remove what was written so far."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._aside is not None:
            self._unlock()
            shutil.rmtree(self._aside, ignore_errors=True)

    def _unlock(self) -> None:
        if self._lock is not None and self._aside is not None:
            (self._aside / LOCK).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


def _no_room(place: Path, error: OSError) -> DataError:
    return DataError(
        f"{place.parent}: the token cache cannot be written ({error.strerror or error}); free some space, "
        "set LLMRECIPE_CACHE to another folder, or set data.cache=false"
    )


def table_folder(key: str) -> Path:
    """Return the folder of the table of a key."""
    return cache_root() / "tokens" / key[:2] / key


def sweep_tables() -> list[Path]:
    """Remove tables unused for long or beyond the size of the cache, and what killed processes left; return them."""
    return sweep((cache_root() / "tokens").glob("*/*"))


def open_table(folder: Path, kind: RowType) -> TokenTable | None:
    """Open the table in a folder, memory-mapped; return None when there is none, or after removing a damaged one."""
    import pyarrow as pa

    if not folder.exists():
        return None
    try:
        content = parse_json((folder / FACTS).read_bytes())
        if "facts" not in content:  # one without checksums, of an older version
            shutil.rmtree(folder, ignore_errors=True)
            return None
        facts = content["facts"]
        if table_key(facts) != content["facts_sha256"] or sha256_of(folder / FILE) != content["rows_sha256"]:
            raise ValueError("its checksums differ")
        mark_used(folder)
        reader = pa.ipc.open_file(pa.memory_map(str(folder / FILE)))
        table = TokenTable([reader.get_batch(i) for i in range(reader.num_record_batches)], kind, facts)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        logger.warning("%s: this table of the token cache is damaged (%s); it is built again", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    table.folder = folder
    return table
