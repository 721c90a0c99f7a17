"""MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.lazy import load_module
from llmrecipe.core.registry import register
from llmrecipe.runs.tracker import OpenTracker, Tracker

if TYPE_CHECKING:
    from types import ModuleType


class Experiment(OpenTracker):
    """An MLflow run."""

    def __init__(self, module: ModuleType):
        self.module = module

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Send metrics."""
        self.module.log_metrics(numbers, step=step)

    def close(self) -> None:
        """End the MLflow run."""
        self.module.end_run()


@register
class Mlflow(Tracker):
    """MLflow: metrics and the recipe in MLflow; the experiment is named after the folder above the run."""

    library: ClassVar[str] = "mlflow"

    def open(self, folder: Path, config: dict[str, Any]) -> OpenTracker:
        """Start a run there."""
        module = load_module("mlflow")
        module.set_experiment(folder.resolve().parent.name)
        module.start_run(run_name=folder.name)
        module.log_dict(config, "recipe.json")
        return Experiment(module)
