"""How much a command says about what it does: nothing, the usual, or everything; on stdout, or next to facts in JSON.

Environment variables hold it, so that the processes a command starts say as much.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

QUIET, VERBOSE, JSON = "LLMRECIPE_QUIET", "LLMRECIPE_VERBOSE", "LLMRECIPE_JSON"


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
