"""Files of a run that grow by a line of JSON at a time, read while a process writes them or after one was killed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger("llmrecipe")


def read_lines(file: Path, parse: Callable[[bytes], dict[str, Any] | None], what: str) -> Iterator[dict[str, Any]]:
    """Yield what is on each line of a file.

    A damaged line is left out with a warning; an incomplete last one, which a running process is writing, silently.

    Args:
        parse: returns None for a line that is empty, cut or damaged.
        what: what a line should be, for the warning.
    """
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        found = parse(line)
        if found is not None:
            yield found
        elif line and number < len(lines):
            logger.warning("%s:%d: this line is not %s; it is left out", file, number, what)
