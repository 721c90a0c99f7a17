"""One writer at a time: a lock file that the operating system releases when its process ends, however it ends."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TextIO

from llmrecipe.core.errors import RunError


def hold(path: Path, busy: str, hint: str = "") -> TextIO:
    """Lock a file; closing the returned handle releases the lock.

    Args:
        busy: the message when another process holds the lock; which process that is gets appended.
        hint: what the user can do about it.

    Raises:
        RunError: another process holds the lock.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.seek(0)
        who = handle.read().strip()
        handle.close()
        raise RunError(f"{busy}{f' ({who})' if who else ''}{hint}") from error
    handle.truncate(0)
    handle.write(f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    handle.flush()
    return handle
