"""A function that is called in a process of its own: what it imports and loads takes no memory here once it has returned."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

from llmrecipe.core.errors import Interrupted, RunError

T = TypeVar("T")
HEAVY = "torch"
"""The module whose import a process is spared."""


def apart(function: Callable[[], T], what: str) -> T:
    """Call a function in a forked process and return its value, or raise what it raised.

    Where the heavy module is loaded already nothing would be spared, and a fork would inherit its threads: the function is
    called here, as on systems without a fork.

    Args:
        function: its value and its errors are pickled.
        what: what it does, for the message where its process is killed.

    Raises:
        RunError: the process was killed.
    """
    if HEAVY in sys.modules or not hasattr(os, "fork"):
        return function()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _answer(function, writer)
    os.close(writer)
    with open(reader, "rb") as pipe:
        content = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        name = signal.Signals(-code).name
        why = " (the system ends processes this way when memory runs out)" if -code == signal.SIGKILL else ""
        raise RunError(f"{what} was ended by {name}{why}")
    if code:
        raise Interrupted(f"{what} was stopped")
    answer: tuple[T, Exception | None] = pickle.loads(content)  # written by this program, a moment ago
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def _answer(function: Callable[[], object], writer: int) -> None:
    """Write the pickled value and error of a function, and leave the process without the parent's clean-up."""
    code = Interrupted.exit_code
    try:
        try:
            answer = pickle.dumps((function(), None))
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = _pickled(error)
        with open(writer, "wb") as pipe:
            pipe.write(answer)
        code = 0
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(code)


def _pickled(error: Exception) -> bytes:
    """Return an error as bytes; one that cannot be rebuilt from its bytes is a RuntimeError of its text."""
    try:
        content = pickle.dumps((None, error))
        pickle.loads(content)
    except Exception:
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        plain.add_note("".join(traceback.format_exception(error)))
        return pickle.dumps((None, plain))
    return content
