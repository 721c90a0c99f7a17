"""One writer at a time: a lock file that the operating system releases when its process ends, however it ends.

Some network file systems have no such locks, and not every system has Unix's. There the number of the process in the file
decides: one that is alive on this machine holds the lock.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from pathlib import Path
from typing import Any, TextIO

from llmrecipe.core.errors import RunError
from llmrecipe.core.foreign import reading
from llmrecipe.core.lazy import is_installed, load_module

TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
"""Error numbers of a lock that another process holds."""
UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK}
"""Error numbers of a file system without locks."""
PROCESS = re.compile(r"process (\d+) ")

UNIX, WINDOWS = "fcntl", "msvcrt"
"""Modules of the two systems that have locks."""
LOCKED_BYTE = 1 << 30
"""Where Windows locks a byte: behind the text, which stays readable."""

logger = logging.getLogger("llmrecipe")


def hold(path: Path, busy: str, hint: str = "") -> TextIO:
    """Lock a file; closing the returned handle releases the lock.

    Args:
        busy: the message when another process holds the lock; which process that is gets appended.
        hint: what the user can do about it.

    Raises:
        RunError: another process holds the lock, or the file cannot be written.
    """
    with reading(f"{path}: cannot be locked for writing"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 (the caller closes it)
    try:
        held = _held(handle, exclusive=True)
        if held:
            handle.seek(0)
            who = handle.read(200).strip()
            raise RunError(f"{busy}{f' ({who})' if who else ''}{hint}")
        handle.truncate(0)
        handle.write(f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        handle.flush()
    except BaseException:
        handle.close()
        raise
    return handle


def is_held(path: Path) -> bool:
    """Return whether a living process holds the lock of a file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            return _held(handle, exclusive=False)
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _held(handle: TextIO, exclusive: bool) -> bool:
    """Try to lock an open file; return whether another process holds it."""
    try:
        _lock(handle, exclusive)
    except OSError as error:
        if error.errno in TAKEN:
            return True
        if error.errno not in UNSUPPORTED:
            raise RunError(f"{handle.name}: cannot be locked: {error.strerror or error}") from error
        logger.info("%s: this file system has no locks (%s)", handle.name, error.strerror)
        return _written_by_a_living_process(handle)
    return False


def _lock(handle: TextIO, exclusive: bool) -> None:
    """Lock an open file by what the system has.

    Raises:
        OSError: another process holds the lock, or there are no locks.
    """
    system: Any
    if is_installed(UNIX):
        system = load_module(UNIX)
        system.flock(handle, (system.LOCK_EX if exclusive else system.LOCK_SH) | system.LOCK_NB)
    elif is_installed(WINDOWS):
        system = load_module(WINDOWS)
        handle.seek(LOCKED_BYTE)
        system.locking(handle.fileno(), system.LK_NBLCK, 1)
    else:
        raise OSError(errno.ENOSYS, "this system has no file locks")


def _written_by_a_living_process(handle: TextIO) -> bool:
    handle.seek(0)
    found = PROCESS.match(handle.read(200))
    number = int(found[1]) if found else os.getpid()
    if number == os.getpid():
        return False
    try:
        os.kill(number, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True
