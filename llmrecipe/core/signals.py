"""Temporary handling of Ctrl-C and SIGTERM by one function."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Send SIGINT and SIGTERM to `handler(number, frame)`, and restore the earlier handlers afterwards.

    Outside the main thread nothing changes: there, signals are up to the program that uses the library.
    """
    kept = {}
    with contextlib.suppress(ValueError):
        kept = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in kept.items():
            signal.signal(number, before)
