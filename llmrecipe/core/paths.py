"""Paths of the files that ship with the package, and of the cache."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
"""The folder of the package `llmrecipe`."""

ASSETS = PACKAGE / "assets"
"""Embedded data (`data`), the embedded model (`tiny`), constitutions; in a wheel also the packaged recipes."""


def cache_root() -> Path:
    """Return `$LLMRECIPE_CACHE`, or ~/.cache/llmrecipe."""
    named = os.environ.get("LLMRECIPE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "llmrecipe"
