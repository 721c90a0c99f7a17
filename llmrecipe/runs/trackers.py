"""Mirrors of the events for experiment trackers. Each is an optional extra, imported only when a recipe names it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llmrecipe.core.errors import RunError, did_you_mean
from llmrecipe.core.lazy import is_installed, load_module

MODULES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb", "mlflow": "mlflow"}
"""Tracker -> the package it needs."""


class Tracker:
    """One tracker: `log` takes numbers by name at a step, `finish` ends it."""

    def __init__(self, log: Callable[[dict[str, float], int], Any], finish: Callable[[], Any]):
        self._log, self._finish = log, finish

    def log(self, event: dict[str, Any]) -> None:
        """Mirror a step or an evaluation; names of steps get the prefix `train/`."""
        if event["event"] not in ("step", "evaluation"):
            return
        prefix = "train/" if event["event"] == "step" else ""
        numbers = {
            f"{prefix}{k}": float(v)
            for k, v in event.items()
            if k not in ("event", "step") and isinstance(v, int | float) and not isinstance(v, bool)
        }
        self._log(numbers, event["step"])

    def close(self) -> None:
        """End it."""
        self._finish()


def check_trackers(names: Iterable[str]) -> None:
    """Refuse trackers that are not installed, before anything is trained.

    Raises:
        RunError: which one, and how to install it.
    """
    for name in names:
        if name not in MODULES:
            raise RunError(f"log.trackers: there is no tracker '{name}'{did_you_mean(name, MODULES)} ({', '.join(MODULES)})")
        if not is_installed(MODULES[name]):
            raise RunError(
                f"log.trackers: {name} is not installed; pip install 'llmrecipe[track]', or pip install {MODULES[name]}"
            )


def open_trackers(names: Iterable[str], folder: Path, config: dict[str, Any]) -> list[Tracker]:
    """Open the trackers of a run.

    Raises:
        RunError: one is not installed.
    """
    names = list(names)
    check_trackers(names)
    return [OPENERS[name](folder, config) for name in names]


def _tensorboard(folder: Path, config: dict[str, Any]) -> Tracker:
    writer = load_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def log(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _wandb_like(name: str) -> Callable[[Path, dict[str, Any]], Tracker]:
    def opener(folder: Path, config: dict[str, Any]) -> Tracker:
        module = load_module(name)
        extra = {"dir": str(folder)} if name == "wandb" else {}
        module.init(project=folder.resolve().parent.name, name=folder.name, config=config, **extra)
        return Tracker(lambda numbers, step: module.log(numbers, step=step), module.finish)

    return opener


def _mlflow(folder: Path, config: dict[str, Any]) -> Tracker:
    module = load_module("mlflow")
    module.set_experiment(folder.resolve().parent.name)
    module.start_run(run_name=folder.name)
    module.log_dict(config, "recipe.json")
    return Tracker(lambda numbers, step: module.log_metrics(numbers, step=step), module.end_run)


OPENERS: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {
    "tensorboard": _tensorboard,
    "trackio": _wandb_like("trackio"),
    "wandb": _wandb_like("wandb"),
    "mlflow": _mlflow,
}
