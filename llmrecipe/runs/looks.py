"""Looks at the test split of a run: each time it was scored, by the training at its end or by an evaluation afterwards.

The first look estimates what the model does with unseen rows. A choice that is made after several looks fits those rows too, so
their number belongs to the result.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from llmrecipe.core.foreign import parse_json, reading

FILE = "looks.jsonl"
"""File of a run with a line for each look."""


def note_look(run: Path, by: str, **facts: object) -> int:
    """Add a look to those of a run and return how many there are.

    Args:
        run: run directory.
        by: what scored the split: training or eval.
        facts: further JSON values, such as the step of the weights.
    """
    line = {"by": by, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts}
    with open(run / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return len(read_looks(run))


def read_looks(run: Path) -> list[dict[str, Any]]:
    """Return the looks of a run, the first one first; none where its test split was never scored.

    Raises:
        RunError: the file is damaged.
    """
    file = run / FILE
    if not file.is_file():
        return []
    with reading(str(file), "remove the line that is no JSON"):
        return [parse_json(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
