"""A function that runs in a thread of its own until its value is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

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

    def value(self) -> T:
        """Wait for the value and return it, or raise what the function raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found[0]
