"""Looks at the test split of a run: each time it was scored, by the training at its end or by an evaluation afterwards.

The first look estimates what the model does with unseen rows. A choice that is made after several looks fits those rows too, so
their number belongs to the result.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from llmrecipe.core.foreign import parse_json
from llmrecipe.runs.json_lines import read_lines

FILE = "looks.jsonl"
"""File of a run with a line for each look."""


def note_look(run: Path, by: str, **facts: object) -> int:
    """Add a look to those of a run and return how many there are.

    A training that was killed while it scored the split and goes on scores the same weights again, which is no further look.

    Args:
        run: run directory.
        by: what scored the split: training or eval.
        facts: what identifies the weights, as JSON values, such as their step; without any, each look is another one.
    """
    before = read_looks(run)
    if facts and any({key: look.get(key) for key in ("by", *facts)} == {"by": by, **facts} for look in before):
        return len(before)
    line = {"by": by, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts}
    with open(run / FILE, "a+b") as file:
        # A process that was killed may have left half a line, which must not swallow this one.
        cut = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"
        file.write(b"\n" * cut + json.dumps(line).encode() + b"\n")
    return len(before) + 1


def read_looks(run: Path) -> list[dict[str, Any]]:
    """Return the looks of a run, the first one first; none where its test split was never scored.

    A damaged line is left out with a warning; an incomplete last one, whose writing was interrupted before the split was read,
    silently.
    """
    file = run / FILE
    if not file.is_file():
        return []
    return list(read_lines(file, _parse, "a look at the test split"))


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the look of a line; None where it is empty, cut or damaged."""
    try:
        look = parse_json(line) if line.strip() else None
    except ValueError:
        return None
    return look if isinstance(look, dict) else None
