"""The interface of an experiment tracker: a mirror of a run's events, imported only when a recipe names it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic.dataclasses import dataclass as pydantic_dataclass

from llmrecipe.core import registry
from llmrecipe.core.errors import RunError
from llmrecipe.core.lazy import is_installed
from llmrecipe.core.registry import CONFIG

if TYPE_CHECKING:
    from types import ModuleType


class OpenTracker:
    """A tracker that takes a run's numbers."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Send numbers by name."""
        raise NotImplementedError

    def close(self) -> None:
        """End the tracker's run."""
        raise NotImplementedError


class ModuleTracker(OpenTracker):
    """A library whose module itself is the run: `log(numbers, step=)` and `finish()`."""

    def __init__(self, module: ModuleType):
        self.module = module

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Send numbers by name."""
        self.module.log(numbers, step=step)

    def close(self) -> None:
        """End the library's run."""
        self.module.finish()


@pydantic_dataclass(config=CONFIG, kw_only=True)
class Tracker:
    """A library that keeps the curves of many runs."""

    group: ClassVar[str] = "tracker"
    library: ClassVar[str] = ""
    """The package it needs."""

    def open(self, folder: Path, config: dict[str, Any]) -> OpenTracker:
        """Start a tracker's run.

        Args:
            folder: the run directory.
            config: the composed recipe, redacted.
        """
        raise NotImplementedError


def numbers_of(event: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a step or an evaluation; names of steps get the prefix `train/`."""
    prefix = "train/" if event["event"] == "step" else ""
    return {
        f"{prefix}{k}": float(v)
        for k, v in event.items()
        if k not in ("event", "step") and isinstance(v, int | float) and not isinstance(v, bool)
    }


OWN_EXTRA = ("wandb", "mlflow")
"""Trackers whose library is large, and an extra of its own; the others are `track` together."""


def check_trackers(names: Iterable[str]) -> None:
    """Refuse trackers that are not installed, before anything is trained.

    Raises:
        RecipeError: there is no tracker of that name.
        RunError: which one is not installed, and how to install it.
    """
    for name in names:
        library = str(registry.spec("tracker", name, "log.trackers").facts["library"])
        if not is_installed(library):
            extra = name if name in OWN_EXTRA else "track"
            raise RunError(f"log.trackers: {name} is not installed ({library}): pip install 'llmrecipe[{extra}]'")


def open_trackers(names: Iterable[str], folder: Path, config: dict[str, Any]) -> list[OpenTracker]:
    """Open the trackers of a run.

    Raises:
        RunError: one is not installed.
    """
    names = list(names)
    check_trackers(names)
    return [registry.load_class("tracker", name)().open(folder, config) for name in names]
