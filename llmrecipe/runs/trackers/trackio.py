"""Trackio."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from llmrecipe.core.lazy import load_module
from llmrecipe.core.registry import register
from llmrecipe.runs.tracker import ModuleTracker, OpenTracker, Tracker


@register
class Trackio(Tracker):
    """Trackio: curves in a local Trackio dashboard; the project is named after the folder above the run."""

    library: ClassVar[str] = "trackio"

    def open(self, folder: Path, config: dict[str, Any]) -> OpenTracker:
        """Start a run there."""
        module = load_module("trackio")
        module.init(project=folder.resolve().parent.name, name=folder.name, config=config)
        return ModuleTracker(module)
