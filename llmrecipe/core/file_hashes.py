"""SHA-256 of files: read off where it is known, computed once otherwise, and remembered.

The model hub's cache names the blob of a large file by its SHA-256. Any other file is read once; its hash is remembered
under its path, size, time of change and inode in `$LLMRECIPE_CACHE/hashes/`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from llmrecipe.core.console import Pace
from llmrecipe.core.foreign import parse_json
from llmrecipe.core.paths import cache_root

CHUNK = 1 << 24
"""Bytes read at a time."""
BLOB = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileHash:
    """The SHA-256 of a file's content."""

    sha256: str
    stamp: tuple[str, int, int, int] | None = None
    """Path, size, time of change in nanoseconds and inode of a file that was read; None where the hash was known."""

    def remember(self) -> str:
        """Keep the hash for later starts, and return it."""
        # A cache that cannot be written costs the next start a second reading, and nothing else.
        with contextlib.suppress(OSError):
            if self.stamp is not None:
                note = _note(self.stamp[0])
                note.parent.mkdir(parents=True, exist_ok=True)
                aside = note.with_name(f"{note.name}.{os.getpid()}.part")
                aside.write_text(json.dumps({"file": self.stamp, "sha256": self.sha256}), encoding="utf-8")
                os.replace(aside, note)
        return self.sha256


def digest(path: Path, doing: str = "") -> str:
    """Return the SHA-256 of a file's content in hex, computed.

    Args:
        doing: what the user reads every few seconds meanwhile, with the file's name and megabytes; nothing by default.

    Raises:
        OSError: it cannot be read.
    """
    total = hashlib.sha256()
    done = 0
    pace = Pace(f"{doing} {path.name}, megabytes", os.stat(path).st_size >> 20) if doing else None
    with open(path, "rb", buffering=0) as file:
        while part := file.read(CHUNK):
            total.update(part)
            done += len(part)
            if pace is not None:
                pace.at(done >> 20)
    return total.hexdigest()


def file_hash(path: Path, doing: str = "") -> FileHash:
    """Return the hash of a file; nothing is written, so that a background thread may call it.

    Args:
        doing: see `digest`; leave it out in the background.

    Raises:
        OSError: it cannot be read.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and BLOB.fullmatch(real.name):
        return FileHash(real.name)
    state = os.stat(real)
    stamp = (str(real), state.st_size, state.st_mtime_ns, state.st_ino)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = parse_json(_note(stamp[0]).read_bytes())
        if kept["file"] == [*stamp] and BLOB.fullmatch(kept["sha256"]):
            return FileHash(str(kept["sha256"]))
    return FileHash(digest(real, doing), stamp)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content in hex, say how far it is meanwhile, and remember it.

    Raises:
        OSError: it cannot be read.
    """
    return file_hash(path, "verifying").remember()


def _note(path: str) -> Path:
    return cache_root() / "hashes" / f"{hashlib.sha256(path.encode()).hexdigest()[:24]}.json"
