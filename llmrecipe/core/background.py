"""A function that runs in a thread of its own until its value is needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from llmrecipe.core.console import say_aside

T = TypeVar("T")


class Background(Generic[T]):
    """The value of a function, computed while the caller goes on; the process may end before it is known.

    Examples:
        >>> Background(lambda: 6 * 7).value()
        42
    """

    def __init__(self, function: Callable[[], T]):
        self._function = function
        self._found: list[T] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found.append(self._function())
        except Exception as error:
            self._error = error

    def value(self, waiting: str = "", every: float = 5.0) -> T:
        """Wait for the value and return it, or raise what the function raised.

        Args:
            waiting: what the user reads every few seconds meanwhile; nothing by default.
        """
        started = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(every if waiting else None)
            if self._thread.is_alive():
                say_aside(f"{waiting}: {time.monotonic() - started:.0f} s so far", progress=True)
        if self._error is not None:
            raise self._error
        return self._found[0]
