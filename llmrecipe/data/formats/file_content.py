"""What a file is, by its first bytes rather than by its name: tables, packed files, JSON under any suffix."""

from __future__ import annotations

import gzip
import json
import mmap
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from llmrecipe.core.errors import DataError

if TYPE_CHECKING:
    from llmrecipe.data.formats.bounds import Bounds

EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".txt", ".text", ".conll")
GZIP, ZIP = b"\x1f\x8b", b"PK\x03\x04"
MAGIC = {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"\xff\xff\xff\xff": ".arrow"}
"""First bytes -> kind: Parquet, an Arrow file, an Arrow stream."""
PACKED = {b"(\xb5/\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z"}
"""First bytes -> what packed a file that is not unpacked here."""
NOT_ROWS = ("dataset_info", "dataset_infos", "dataset_dict", "state", "config", "package", "requirements", "license", "readme")
"""Stems of files that accompany data and hold no rows."""


def suffix_kind(name: str) -> str:
    """Return the extension of a name, without `.gz` or `.zip`."""
    return Path(name.lower().removesuffix(".gz").removesuffix(".zip")).suffix


def is_data_file(path: Path) -> bool:
    """Return whether a file in a folder of data holds rows, by its name and, where that says nothing, its first bytes."""
    if not path.is_file() or path.name.startswith((".", "_")) or path.name.lower().split(".")[0] in NOT_ROWS:
        return False
    return suffix_kind(path.name) in EXTENSIONS or any(first_bytes(path).startswith(magic) for magic in MAGIC)


def first_bytes(path: Path) -> bytes:
    """Return the first bytes of a file."""
    with path.open("rb") as file:
        return file.read(8)


def content_of(path: Path, bounds: Bounds) -> tuple[bytes | mmap.mmap, str]:
    """Return the bytes of a file, memory-mapped unless packed, and the name of what they are.

    Raises:
        DataError: a damaged or unknown kind of packing, or a zip file of several files.
    """
    head = first_bytes(path)
    if (packer := next((name for magic, name in PACKED.items() if head.startswith(magic)), None)) is not None:
        raise DataError(f"{path}: the file is packed with {packer}, which is not read here; unpack it (gzip and zip are read)")
    if head.startswith(ZIP):
        return _zipped(path, bounds)
    if not head.startswith(GZIP):
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path.name
    try:
        with gzip.open(path) as packed:
            content = packed.read(bounds.unpacked + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged ({error}); download or write it again") from error
    bounds.check_unpacked(len(content), path)
    return content, path.name


def _zipped(path: Path, bounds: Bounds) -> tuple[bytes, str]:
    """Return the one data file in a zip file, and its name."""
    try:
        with zipfile.ZipFile(path) as packed:
            names = [n for n in packed.namelist() if not n.endswith("/") and not n.startswith("__MACOSX/")]
            if any(name.startswith("xl/") for name in names):
                raise DataError(f"{path}: the file is a spreadsheet; save it as CSV")
            files = [n for n in names if len(names) == 1 or suffix_kind(n) in EXTENSIONS]
            if len(files) != 1:
                listed = ", ".join(files[:5]) or "no data file"
                raise DataError(f"{path}: the zip file holds {listed}; unpack it and name one file, or the folder")
            with packed.open(files[0]) as member:
                content = member.read(bounds.unpacked + 1)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError, OSError) as error:
        raise DataError(f"{path}: the zip file is damaged or locked ({error}); download or write it again") from error
    bounds.check_unpacked(len(content), path)
    return content, files[0]


def content_kind(data: bytes | mmap.mmap, named: str) -> str:
    """Return the kind of some content: what its bytes say, else the kind its name says.

    Examples:
        >>> content_kind(b'[{"text": "a"}]', ".csv"), content_kind(b'{"text": "a"}', ".txt")
        ('.json', '.jsonl')
        >>> content_kind(b"[Exit, pursued by a bear.]", ".txt")
        '.txt'
    """
    head = bytes(data[:64])
    if (known := next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)) is not None:
        return known
    begin = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if begin == b"[" and named != ".json" and _is_rows(bytes(data)):
        return ".json"
    if begin == b"{" and named not in (".jsonl", ".ndjson", ".json") and _begins_with_objects(data):
        return ".jsonl"
    return named


def _is_rows(data: bytes) -> bool:
    """Return whether text is one JSON array of objects."""
    if data.rstrip()[-1:] != b"]":
        return False
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(rows, list) and all(isinstance(row, dict) for row in rows)


def _begins_with_objects(data: bytes | mmap.mmap) -> bool:
    """Return whether the first lines of text are JSON objects."""
    lines = [line for line in bytes(data[: 1 << 20]).removeprefix(b"\xef\xbb\xbf").split(b"\n")[:4] if line.strip()]
    try:
        return all(isinstance(json.loads(line), dict) for line in (lines[:2] if len(lines) > 2 else lines))
    except (ValueError, RecursionError):
        return False
