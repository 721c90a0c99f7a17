"""How much a command says about what it does: nothing, the usual, or everything; on stdout, or next to facts in JSON.

Environment variables hold it, so that the processes a command starts say as much.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import TextIO

QUIET, VERBOSE, JSON = "LLMRECIPE_QUIET", "LLMRECIPE_VERBOSE", "LLMRECIPE_JSON"

LOGGER = "llmrecipe"


@contextlib.contextmanager
def for_one_command() -> Iterator[None]:
    """Put back, after a command, what its flags have set: the variables and the log."""
    before = {name: os.environ.get(name) for name in (QUIET, VERBOSE, JSON)}
    logger = logging.getLogger(LOGGER)
    level, handlers = logger.level, list(logger.handlers)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})
        logger.setLevel(level)
        logger.handlers[:] = handlers


def show_log() -> None:
    """Show the log of the package on stderr."""
    logger, handler = logging.getLogger(LOGGER), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("log: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)


def is_quiet() -> bool:
    """Return whether only results, warnings and errors are shown."""
    return QUIET in os.environ


def is_verbose() -> bool:
    """Return whether every step, every metric and the log are shown."""
    return VERBOSE in os.environ


def progress_stream() -> TextIO | None:
    """Return where progress is shown: stdout, stderr where stdout holds JSON, None where it is not shown."""
    if is_quiet():
        return None
    return sys.stderr if JSON in os.environ else sys.stdout
