"""What `llmrecipe verify RUN` found, kept in the run's folder so that its report shows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmrecipe.core.foreign import read_json
from llmrecipe.runs.run_dir import RunDir, now

VERIFIED = "verify.json"


def keep_verified(run: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write the lines of a verification, with the time and the step of the run.

    Args:
        lines: `check`, `result`, `compared`, `difference`, `bound` and `reason` of each comparison.

    Raises:
        RunError: the folder is not a run, or cannot be written.
    """
    opened = RunDir.open(run, write=False)
    content = {"time": now(), "step": opened.read_status().get("step"), "lines": list(lines)}
    opened.write(VERIFIED, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_verified(run: Path) -> dict[str, Any]:
    """Return what `keep_verified` wrote; empty where the run was not verified.

    Raises:
        RunError: the file is damaged.
    """
    file = run / VERIFIED
    return dict(read_json(file, "what was verified cannot be read")) if file.is_file() else {}
