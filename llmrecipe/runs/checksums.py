"""Checksums of the files of a folder: `checksums.json`, verified when the files are used.

    {"files": {"delta.safetensors": {"sha256": "…", "bytes": 1234}, …}}

A file that was cut short or changed is noticed before it is used. A folder without `checksums.json` was written before there
was one, and is used as it is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmrecipe.core.errors import RunError
from llmrecipe.core.file_hashes import BLOB, digest, sha256_of
from llmrecipe.core.foreign import parse_json

FILE = "checksums.json"
LARGE = 1 << 26
"""Bytes from which on a hash is remembered while path, size, time of change and inode are the same, and not computed again."""
FREE = ("README.md", "metrics.json", FILE)
"""Files of `final/` that may be edited."""

logger = logging.getLogger("llmrecipe")


def write_checksums(folder: Path) -> None:
    """Write `checksums.json` for every file below a folder."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != FILE):
        found = digest(path, "hashing")
        files[path.relative_to(folder).as_posix()] = {"sha256": found, "bytes": path.stat().st_size}
    (folder / FILE).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def read_checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Return file -> {sha256, bytes} of a folder.

    Raises:
        FileNotFoundError: there are no checksums.
        ValueError: they are damaged.
    """
    content = parse_json((folder / FILE).read_bytes())
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        raise ValueError("it lists no files")
    for name, entry in files.items():
        inside = name and not Path(name).is_absolute() and ".." not in Path(name).parts
        if not (inside and isinstance(entry, dict) and type(entry.get("bytes")) is int and _is_hash(entry.get("sha256"))):
            raise ValueError(f"its entry {name!r} is not a checksum")
    return files


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and BLOB.fullmatch(value) is not None


def file_fault(file: Path, wanted: dict[str, Any], remembered: bool = False) -> str | None:
    """Return what is wrong with a file; None where it has its size and its checksum.

    Args:
        remembered: a large file may have been read by an earlier process.
    """
    if not file.is_file():
        return f"{file.name} is missing"
    size = file.stat().st_size
    if size != wanted["bytes"]:
        return f"{file.name} has {size} bytes instead of {wanted['bytes']}"
    found = sha256_of(file) if remembered and size >= LARGE else digest(file, "verifying")
    return None if found == wanted["sha256"] else f"{file.name} has changed since it was written"


def verify(folder: Path, used: Callable[[str], bool]) -> None:
    """Verify the files of a result that are about to be used; a folder without checksums passes.

    Args:
        used: whether a file, named relative to the folder, is used.

    Raises:
        RunError: a file is missing, cut short or changed.
    """
    try:
        listed = read_checksums(folder)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        logger.warning("%s is damaged (%s), so the files it lists cannot be verified", folder / FILE, error)
        return
    for name, wanted in listed.items():
        if name not in FREE and used(name) and (wrong := file_fault(folder / name, wanted, remembered=True)) is not None:
            raise RunError(
                f"{folder}: {wrong}, so it is not used; copy the folder again, or finish the run again with resume=. Where the "
                f"change is meant, delete {folder / FILE}"
            )
