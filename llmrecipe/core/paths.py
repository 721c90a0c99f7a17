"""Paths of the files that ship with the package."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
"""The folder of the package `llmrecipe`."""

ASSETS = PACKAGE / "assets"
"""Embedded data (`data`), the embedded model (`tiny`), constitutions; in a wheel also the packaged recipes."""
