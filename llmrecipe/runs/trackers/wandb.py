"""Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from llmrecipe.core.lazy import load_module
from llmrecipe.core.registry import register
from llmrecipe.runs.tracker import ModuleTracker, OpenTracker, Tracker


@register
class Wandb(Tracker):
    """Weights & Biases: curves at Weights & Biases; the project is named after the folder above the run."""

    library: ClassVar[str] = "wandb"

    def open(self, folder: Path, config: dict[str, Any]) -> OpenTracker:
        """Start a run there."""
        module = load_module("wandb")
        module.init(project=folder.resolve().parent.name, name=folder.name, config=config, dir=str(folder))
        return ModuleTracker(module)
