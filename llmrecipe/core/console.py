"""Console output: tables, numbers, JSON, lines; the only module except the verbs that writes to the screen."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from llmrecipe.core.printable import printable
from llmrecipe.core.verbosity import is_quiet, progress_stream

if TYPE_CHECKING:
    from rich.console import Console


T = TypeVar("T")
BARS = "▁▂▃▄▅▆▇█"
EVERY = 5.0
"""Seconds between two lines of something that lasts."""


def console(stderr: bool = False) -> Console:
    """Return a console as wide as the terminal, and wide enough for whole lines in a pipe.

    Strings, also those in tables, are shown as they are: brackets are no markup, and control characters are escaped.
    """
    from rich.console import Console
    from rich.text import Text

    class Plain(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options)

    stream = sys.stderr if stderr else sys.stdout
    width = shutil.get_terminal_size().columns if stream.isatty() else 160
    return Plain(width=width, highlight=False, markup=False, emoji=False, stderr=stderr)


def value_text(value: object) -> str:
    """Return a value as it is written in a recipe."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def number(value: object) -> str:
    """Return a number as a person reads it: four digits, exponent for the tiny, separators for the large.

    Examples:
        >>> number(1234567), number(0.123456), number(0.00001234)
        ('1,234,567', '0.1235', '1.23e-05')
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-" if value is None else str(value)
    if isinstance(value, int) or abs(value) >= 10000:
        return f"{value:,.0f}"
    return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.4g}"


def sparkline(values: list[float], width: int = 60) -> str:
    """Return a curve in one line of block characters; more values than columns are averaged."""
    if not values:
        return ""
    columns = min(width, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    means = [sum(part) / len(part) for a, b in itertools.pairwise(edges) if (part := values[a:b])]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int((m - low) / span * len(BARS)))] for m in means)


def print_json(facts: object) -> None:
    """Print facts as indented JSON on stdout."""
    print(json.dumps(facts, indent=2, ensure_ascii=False, default=str))


def counted(items: Iterable[T], what: str, total: int, every: float = 5.0) -> Iterator[T]:
    """Yield items, and print `what: 12 of 64` whenever `every` seconds have passed; nothing where `total` is 0."""
    last = time.monotonic()
    for number, item in enumerate(items):
        if total and time.monotonic() - last >= every:
            say_progress(f"{what}: {number} of {total}")
            last = time.monotonic()
        yield item


class Pace:
    """Says on stderr how far something long has come, whenever `every` seconds have passed; only in the main process."""

    def __init__(self, what: str, total: int, every: float = 5.0) -> None:
        self.what, self.total, self.every = what, total, every
        self._last = time.monotonic()

    def at(self, done: int) -> None:
        """Print `what: 12 of 64` where it is time."""
        if time.monotonic() - self._last >= self.every:
            say_aside(f"{self.what}: {done:,} of {self.total:,}", progress=True)
            self._last = time.monotonic()


@contextlib.contextmanager
def lasting(what: str, so_far: Callable[[], str] | None = None) -> Iterator[None]:
    """Say on stderr that something long goes on, whenever `EVERY` seconds have passed inside the context.

    Args:
        so_far: called for how far it has come: `what: 10 s so far, 3 of 8 rows`.
    """
    over = threading.Event()
    started = time.monotonic()

    def repeat() -> None:
        while not over.wait(EVERY):
            more = f", {so_far()}" if so_far is not None else ""
            say_aside(f"{what}: {time.monotonic() - started:.0f} s so far{more}", progress=True)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def say(line: str) -> None:
    """Print one line at once, printable, also into a pipe."""
    print(printable(line), flush=True)


def say_progress(line: str) -> None:
    """Print one line about what goes on, which `--quiet` leaves out and `--json` puts on stderr."""
    stream = progress_stream()
    if stream is not None:
        print(printable(line), file=stream, flush=True)


def say_aside(line: str, progress: bool = False) -> None:
    """Print one line at once on stderr, so that JSON on stdout stays whole; only in the main process.

    Args:
        progress: it says what goes on, which `--quiet` leaves out.
    """
    if os.environ.get("RANK", "0") == "0" and not (progress and is_quiet()):
        print(printable(line), file=sys.stderr, flush=True)
