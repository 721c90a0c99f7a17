"""The folders that runs make for themselves where `run.dir` names none, and what a run is called."""

from __future__ import annotations

import re
import time
from pathlib import Path

from llmrecipe.core.errors import RunError

STAMPED = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}(-\d+)?")
"""Name of a folder that a run made for itself, where `run.dir` names none."""


def run_title(path: Path) -> str:
    """Return what to call a run: the name of its folder, or of the folder above where its own is `<time>-<key>`.

    Examples:
        >>> run_title(Path("runs/mine")), run_title(Path("runs/sft/20260131-093000-0a1b2c3d"))
        ('mine', 'sft')
    """
    return path.parent.name if STAMPED.fullmatch(path.name) and path.parent.name else path.name


def fresh_folder(parent: Path, key: str) -> Path:
    """Create a folder `<time>-<key>`; runs that start in the same second are numbered.

    Raises:
        RunError: the folder cannot be created.
    """
    base = f"{time.strftime('%Y%m%d-%H%M%S')}-{key}"
    for number in range(1, 1000):
        path = parent / (base if number == 1 else f"{base}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise RunError(
                f"run.root: cannot create {path}: {error.strerror or error}; set run.root to a folder that you may write"
            ) from error
        return path
    raise RunError(f"run.root: {parent} already contains a thousand runs of this second")
