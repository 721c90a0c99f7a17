"""Removing what a cache no longer needs: entries long unused, entries beyond its size, and what killed writers left.

An entry is a folder or a file; its time of change is when it was last used (`mark_used`). Entries used within a day are never
removed, so a run does not lose what another one reads, and one of them may fill the disk more than `ROOM` allows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

from llmrecipe.core.file_lock import is_held

DAY = 86_400.0
"""Seconds."""
KEPT_DAYS = 30.0
"""Days after which an unused entry is removed."""
ROOM = 50 * 2**30
"""Bytes above which the entries unused for longest are removed."""
LOCK = "lock"
"""File in an unfinished folder that its writer holds locked."""
UNFINISHED = ".part"
"""Suffix of a folder that is being written, or deleted."""

logger = logging.getLogger("llmrecipe")


def mark_used(entry: Path) -> None:
    """Set the time of last use of an entry; a cache that cannot be written is only read."""
    with contextlib.suppress(OSError):
        os.utime(entry)


def sweep(entries: Iterable[Path], kept_days: float = KEPT_DAYS, room: int = ROOM) -> list[Path]:
    """Remove the entries nobody needs, and return them.

    Removed are unfinished folders without a living writer, a day after their last change; entries unused for `kept_days`;
    then those unused for longest until the rest fits into `room` bytes.
    """
    now = time.time()
    removed: list[Path] = []
    finished: list[tuple[float, int, Path]] = []
    for entry in entries:
        with contextlib.suppress(OSError):  # another process was first
            if entry.name.endswith(UNFINISHED):
                if now - _last_change(entry) > DAY and not is_held(entry / LOCK):
                    removed += _remove(entry)
            else:
                finished.append((entry.stat().st_mtime, _size(entry), entry))
    total = sum(size for _, size, _ in finished)
    for used, size, entry in sorted(finished):
        if now - used > kept_days * DAY or (total > room and now - used > DAY):
            removed += _remove(entry)
            total -= size
    if removed:
        logger.info("%s: removed %d old entries", removed[0].parent, len(removed))
    return removed


def _last_change(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))


def _size(entry: Path) -> int:
    return sum(path.stat().st_size for path in (entry, *entry.rglob("*")) if path.is_file())


def _remove(entry: Path) -> list[Path]:
    """Rename an entry before it is deleted, so that a reader finds all of it or none."""
    aside = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}{UNFINISHED}")
    try:
        entry.rename(aside)
    except OSError:
        return []
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)
    return [entry]
