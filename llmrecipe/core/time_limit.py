"""Bounds on the time and memory of what data or a foreign artefact decides: regular expressions and templates.

A pattern that somebody else wrote can take years on a short text, and so can a template. `within` stops a pattern by the
timeout of the library `regex`, in every thread. `bounded` stops any Python code by an interval timer of the system and, on
Linux, by a limit on its memory: in the main thread only, and not on Windows; elsewhere nothing bounds a template. `awaited`
stops waiting for compiled code, which no signal interrupts.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.core.lazy import load_module

if TYPE_CHECKING:
    import regex

T = TypeVar("T")

SECONDS = 5.0
"""Longest time of one pattern on one text, and of one rendering, in seconds."""
AGAIN = 0.5
"""Seconds after which code that caught what stops it is stopped once more."""
MEMORY = 1 << 30
"""Bytes by which the process may grow in one rendering."""


@functools.lru_cache(maxsize=256)
def compiled(pattern: str, where: str, ignore_case: bool = False, dot_all: bool = False) -> regex.Pattern[str]:
    """Compile a regular expression.

    Args:
        where: key path for the message.
        dot_all: a dot matches line ends too.

    Raises:
        RecipeError: it is not one.
    """
    library = load_module("regex")
    try:
        found: regex.Pattern[str] = library.compile(pattern, library.DOTALL * dot_all | library.IGNORECASE * ignore_case)
        return found
    except (library.error, RecursionError, OverflowError, MemoryError) as error:
        raise RecipeError(f"{where}: not a regular expression: {error}; got {pattern!r:.200}") from error


def within(find: Callable[..., T], text: str, where: str) -> T:
    """Return what a method of a compiled pattern finds in a text: `search`, `match`, `fullmatch` or `findall`.

    Raises:
        RunError: it took longer than `SECONDS`.
    """
    try:
        return find(text, timeout=SECONDS)
    except TimeoutError as error:
        raise RunError(
            f"{where}: this pattern takes longer than {SECONDS:g} s on a text of {len(text):,} characters ({text!r:.80}); "
            "repetitions inside repetitions, such as (a+)+, are the usual reason"
        ) from error


def matches(pattern: regex.Pattern[str], text: str, where: str) -> list[regex.Match[str]]:
    """Return every match of a compiled pattern in a text.

    Raises:
        RunError: they took longer than `SECONDS`.
    """
    return within(lambda text, timeout: list(pattern.finditer(text, timeout=timeout)), text, where)


class BoundError(Exception):
    """The code inside `bounded` used up its time or its memory."""


class _TimeUp(BaseException):
    """The time of `bounded` is over; no `Exception`, which the code inside might take for a fault of its own and go on."""


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Stop the code inside after some seconds of this process's CPU time, or when it takes much more memory.

    The time is that of the program and of the system on its behalf, which memory costs.

    Raises:
        BoundError: it does.
    """
    timer = getattr(signal, "ITIMER_PROF", None)
    if timer is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    over = False

    def stop(number: int, frame: object) -> None:
        if not over:
            raise _TimeUp

    before = signal.signal(signal.SIGPROF, stop)
    try:
        with _address_space(memory):
            signal.setitimer(timer, seconds, AGAIN)
            try:
                yield
            finally:
                signal.setitimer(timer, 0)
    except _TimeUp as error:
        raise BoundError(f"it takes longer than {seconds:g} s") from error
    except MemoryError as error:
        raise BoundError(f"it takes more than {memory >> 20:,} MB of memory") from error
    finally:
        over = True
        signal.setitimer(timer, 0)
        signal.signal(signal.SIGPROF, before)


class _Worker:
    """A thread that makes one call after another: to start one takes longer than most calls."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while True:
            self.calls.get()()


_IDLE: deque[_Worker] = deque()


def _idle_worker() -> _Worker:
    """Return a worker that waits for a call, or a new one; a process that was forked has no threads of its parent's workers."""
    while True:
        try:
            worker = _IDLE.pop()
        except IndexError:
            return _Worker()
        if worker.thread.is_alive():
            return worker


def awaited(function: Callable[[], T], seconds: float) -> T:
    """Return the value of a function that runs compiled code, or give up on it.

    It is called in another thread, since compiled code cannot be stopped: what was given up on ends with the process. It must
    release the interpreter's lock while it runs.

    Args:
        seconds: CPU time of this process, so that a busy machine is no fault of the function; it may use all cores.

    Raises:
        BoundError: it took longer.
        BaseException: what the function raised.
    """
    over = threading.Event()
    values: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            values.append(function())
        except BaseException as error:  # a panic of a library is no `Exception`
            errors.append(error)
        finally:
            over.set()

    began = time.process_time()
    worker = _idle_worker()
    worker.calls.put(call)
    left = seconds
    while not over.wait(max(left, 0.05)):
        left = seconds - (time.process_time() - began)
        if left <= 0:
            raise BoundError(f"it takes longer than {seconds:g} s")
    _IDLE.append(worker)
    if errors:
        raise errors[0]
    return values[0]


@contextlib.contextmanager
def _address_space(more: int) -> Iterator[None]:
    """Let the process grow by some bytes at most, where the system says how large it is (Linux)."""
    try:
        resource: Any = load_module("resource")
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError, ValueError, IndexError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + more
    limit = wanted if soft == resource.RLIM_INFINITY else min(wanted, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
