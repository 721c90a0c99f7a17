"""What a file is, by its first bytes rather than by its name: tables, packed files, JSON under any suffix."""

from __future__ import annotations

import gzip
import io
import json
import mmap
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from llmrecipe.core.errors import DataError

if TYPE_CHECKING:
    from llmrecipe.data.formats.bounds import Bounds

EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".txt", ".text", ".conll")
GZIP, ZIP = b"\x1f\x8b", (b"PK\x03\x04", b"PK\x05\x06")
POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file of Git LFS begins that was not downloaded."""
NESTED = 3
"""How often a file may be packed."""
BOM = b"\xef\xbb\xbf"
BEGIN = re.compile(rb"(?:\xef\xbb\xbf)?\s*(\S?)")
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
        DataError: a damaged or unknown kind of packing, a zip file of several files, or a file that was not downloaded.
    """
    with path.open("rb") as file:
        content: bytes | mmap.mmap = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    name = path.name
    for _ in range(NESTED):
        head = content[: len(POINTER)]
        if head.startswith(GZIP):
            content = _gunzipped(path, content, bounds)
        elif head.startswith(ZIP):
            content, name = _zipped(path, content, bounds)
        else:
            break
    if head == POINTER:
        raise DataError(f"{path}: the file is a pointer of Git LFS, its content was not downloaded; `git lfs pull` does it")
    if (packer := next((name for magic, name in PACKED.items() if head.startswith(magic)), None)) is not None:
        raise DataError(f"{path}: the file is packed with {packer}, which is not read here; unpack it (gzip and zip are read)")
    return content, name


def _gunzipped(path: Path, content: bytes | mmap.mmap, bounds: Bounds) -> bytes:
    try:
        with gzip.GzipFile(fileobj=_opened(path, content)) as packed:
            found = packed.read(bounds.unpacked + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged ({error}); download or write it again") from error
    bounds.check_unpacked(len(found), path)
    return found


def _opened(path: Path, content: bytes | mmap.mmap) -> BinaryIO:
    return io.BytesIO(content) if isinstance(content, bytes) else path.open("rb")


def _zipped(path: Path, content: bytes | mmap.mmap, bounds: Bounds) -> tuple[bytes, str]:
    """Return the one data file in a zip file, and its name."""
    try:
        with zipfile.ZipFile(_opened(path, content)) as packed:
            names = [n for n in packed.namelist() if not n.endswith("/") and not n.startswith("__MACOSX/")]
            if any(name.startswith("xl/") for name in names):
                raise DataError(f"{path}: the file is a spreadsheet; save it as CSV")
            files = [n for n in names if len(names) == 1 or suffix_kind(n) in EXTENSIONS]
            if len(files) != 1:
                listed = ", ".join(files[:5]) or "no data file"
                raise DataError(f"{path}: the zip file holds {listed}; unpack it and name one file, or the folder")
            with packed.open(files[0]) as member:
                found = member.read(bounds.unpacked + 1)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError, OSError) as error:
        raise DataError(f"{path}: the zip file is damaged or locked ({error}); download or write it again") from error
    bounds.check_unpacked(len(found), path)
    return found, files[0]


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
    begin = first_sign(data)
    if begin == b"[" and named != ".json" and _is_rows(bytes(data)):
        return ".json"
    if begin == b"{" and named not in (".jsonl", ".ndjson", ".json") and _begins_with_objects(data):
        return ".jsonl"
    return named


def first_sign(data: bytes | mmap.mmap) -> bytes:
    """Return the first byte of some text that is no white space and no byte order mark; nothing where there is none.

    Examples:
        >>> first_sign(b"\\xef\\xbb\\xbf\\n [1]")
        b'['
    """
    found = BEGIN.match(data)
    return found[1] if found else b""


def not_utf8(error: UnicodeDecodeError, where: str, start: int = 0) -> DataError:
    """Return the error for bytes that are not UTF-8 text.

    Args:
        where: file and line.
        start: byte at which the line begins in what was decoded.
    """
    return DataError(f"{where}: not UTF-8 text (byte {error.start - start}: {error.reason}); convert the file to UTF-8")


def refuse_repeated(names: Sequence[str], where: str) -> None:
    """Refuse columns of one name.

    Raises:
        DataError: naming the first.
    """
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise DataError(f"{where}: the column '{name}' is there {count} times; rename or remove all but one")


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
    lines = [line for line in bytes(data[: 1 << 20]).removeprefix(BOM).split(b"\n")[:4] if line.strip()]
    try:
        return all(isinstance(json.loads(line), dict) for line in (lines[:2] if len(lines) > 2 else lines))
    except (ValueError, RecursionError):
        return False
