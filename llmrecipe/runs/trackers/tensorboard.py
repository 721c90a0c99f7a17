"""TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.lazy import load_module
from llmrecipe.core.registry import register
from llmrecipe.runs.tracker import OpenTracker, Tracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Writer(OpenTracker):
    """A summary writer."""

    def __init__(self, writer: SummaryWriter):
        self.writer = writer

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Write one scalar a number."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        self.writer.close()


@register
class Tensorboard(Tracker):
    """TensorBoard: curves as TensorBoard event files in `RUN/tensorboard`."""

    library: ClassVar[str] = "tensorboard"

    def open(self, folder: Path, config: dict[str, Any]) -> OpenTracker:
        """Start a run there."""
        writer = load_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))
        return Writer(writer)
