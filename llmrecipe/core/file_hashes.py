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

from llmrecipe.core.paths import cache_root

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


def file_hash(path: Path) -> FileHash:
    """Return the hash of a file; nothing is written, so that a background thread may call it.

    Raises:
        OSError: it cannot be read.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and BLOB.fullmatch(real.name):
        return FileHash(real.name)
    state = os.stat(real)
    stamp = (str(real), state.st_size, state.st_mtime_ns, state.st_ino)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(_note(stamp[0]).read_text(encoding="utf-8"))
        if kept["file"] == [*stamp] and BLOB.fullmatch(kept["sha256"]):
            return FileHash(str(kept["sha256"]))
    with open(real, "rb") as file:
        return FileHash(hashlib.file_digest(file, "sha256").hexdigest(), stamp)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content in hex, and remember it.

    Raises:
        OSError: it cannot be read.
    """
    return file_hash(path).remember()


def _note(path: str) -> Path:
    return cache_root() / "hashes" / f"{hashlib.sha256(path.encode()).hexdigest()[:24]}.json"
