"""Standard output and errors that cannot end a program: the reader may have left, the disk be full, the terminal be gone."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO, cast


def open_streams() -> None:
    """Open the standard streams where the program was started without them, and let them escape what a terminal cannot show.

    A stream that a library or a test put in their place stays as it is.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (lives as long as the process)
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


class Steady:
    """A text stream that drops what its stream refuses.

    Everything but writing is passed on.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: the file is closed
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write lines, or drop them."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand over what was written, or drop it."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Return whether a person watches."""
        with contextlib.suppress(OSError, ValueError):
            return self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Drop what standard output and standard error refuse: work goes on when nobody can watch it."""
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_steady(stream) for stream in kept)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = kept


def _steady(stream: TextIO) -> TextIO:
    # Either may be missing, as under pythonw.
    return stream if stream is None or isinstance(stream, Steady) else cast(TextIO, Steady(stream))


def let_go(stream: TextIO | None) -> OSError | None:
    """Flush a stream for the last time; return why it refuses, and then point it at nothing.

    The interpreter flushes once more at its end and would fail there.
    """
    if stream is None:
        return None
    try:
        stream.flush()
    except ValueError:  # it is closed
        return None
    except OSError as error:
        with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)
        return error
    return None
