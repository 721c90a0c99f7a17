"""What `llmrecipe verify RUN` found, kept in the run's folder so that its report shows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmrecipe.core.errors import RunError
from llmrecipe.core.foreign import read_json
from llmrecipe.runs.durable import write_text
from llmrecipe.runs.run_dir import RunDir, now

VERIFIED = "verify.json"


def keep_verified(run: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write the lines of a verification, with the time and the step of the run.

    Args:
        lines: `check`, `result`, `compared`, `difference`, `bound` and `reason` of each comparison.

    Raises:
        RunError: the folder is not a run, or cannot be written.
    """
    status = RunDir.open(run, write=False).read_status()
    content = {"time": now(), "step": status.get("step"), "lines": list(lines)}
    try:
        write_text(run / VERIFIED, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise RunError(f"cannot write {run / VERIFIED}: {error.strerror or error}") from error


def read_verified(run: Path) -> dict[str, Any]:
    """Return what `keep_verified` wrote; empty where the run was not verified.

    Raises:
        RunError: the file is damaged.
    """
    file = run / VERIFIED
    return dict(read_json(file, "what was verified cannot be read")) if file.is_file() else {}
