"""Ctrl-C and SIGTERM handed to one function for a while."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler(number, frame)`; afterwards to whom they went before.

    Outside the main thread nothing changes: signals are then the business of whoever uses the library.
    """
    kept = {}
    with contextlib.suppress(ValueError):
        kept = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in kept.items():
            signal.signal(number, before)
