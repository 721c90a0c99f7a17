"""Temporary handling of Ctrl-C, SIGTERM and SIGHUP by one function."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a program to stop; a terminal that is closed sends SIGHUP."""


@contextlib.contextmanager
def handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Send SIGINT, SIGTERM and SIGHUP to `handler(number, frame)`, and restore the earlier handlers afterwards.

    SIGHUP stays ignored where the program was started that way (`nohup`). Outside the main thread nothing changes: there,
    signals are up to the program that uses the library.
    """
    kept: dict[int, Any] = {}
    with contextlib.suppress(ValueError):
        for number in STOPPING:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                kept[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in kept.items():
            signal.signal(number, before)
