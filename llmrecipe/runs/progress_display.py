"""Display of a run's progress: a live panel on a terminal, plain lines everywhere else."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from llmrecipe.core.console import number, sparkline
from llmrecipe.core.printable import message_text
from llmrecipe.core.score_intervals import ENDS, shown
from llmrecipe.core.verbosity import is_verbose, progress_stream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType


HIDDEN = {"event", "step", "tokens", "path"}
"""Keys that the table does not show."""
ALWAYS = {"loss", "lr", "tokens_per_s"}
"""Values that are shown of every run."""
ALL = "all"
"""Stands for every metric among those to show."""


class Display(Protocol):
    """Shows events as they come."""

    def show(self, event: dict[str, Any], replay: bool = False) -> None:
        """Show one event; a replayed one is from before a resume."""

    def expect(self, steps: int) -> None:
        """Set the length of the run."""

    def close(self) -> None:
        """Restore the terminal."""


def display(live: str, steps: int | None, stream: TextIO | None = None, metrics: Sequence[str] = (ALL,)) -> Display:
    """Return a live panel when requested or on a terminal, plain lines otherwise; warnings alone under `--quiet`.

    Args:
        metrics: names, without the split in front, of what is shown besides the loss, the learning rate and the speed.
    """
    stream = stream or progress_stream()
    if stream is None:
        return Warnings(sys.stderr)
    metrics = (ALL,) if is_verbose() else metrics
    attended = stream.isatty() and os.environ.get("TERM") != "dumb" and "CI" not in os.environ
    kind: type[Panel | Lines] = Panel if live == "on" or (live == "auto" and attended) else Lines
    if kind is Lines and is_verbose():
        return Lines(steps, stream, seconds=0.0, metrics=metrics)
    return kind(steps, stream, metrics=metrics)


class Warnings:
    """Warnings alone."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def show(self, event: dict[str, Any], replay: bool = False) -> None:
        """See `Display.show`."""
        if event["event"] == "warning" and not replay:
            print(event_text(event), file=self.stream, flush=True)

    def expect(self, steps: int) -> None:
        """See `Display.expect`."""

    def close(self) -> None:
        """See `Display.close`."""


class Lines:
    """Plain lines, at most one a second for steps, so that a log stays readable."""

    def __init__(self, steps: int | None, stream: TextIO, seconds: float = 1.0, metrics: Sequence[str] = (ALL,)):
        self.steps, self.stream, self.seconds, self.metrics = steps, stream, seconds, metrics
        self.shown = -seconds

    def show(self, event: dict[str, Any], replay: bool = False) -> None:
        """See `Display.show`."""
        kind, step = event["event"], event["step"]
        if replay or kind == "memory":
            return
        if kind == "step":
            now = time.monotonic()
            if now - self.shown < self.seconds and step not in (1, self.steps):
                return
            self.shown = now
        at = f"step {step}" + (f"/{self.steps}" if self.steps else "")
        print(f"{at}  {event_text(event, self.metrics)}", file=self.stream, flush=True)

    def expect(self, steps: int) -> None:
        """See `Display.expect`."""
        self.steps = steps

    def close(self) -> None:
        """See `Display.close`."""


def displayed(event: dict[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    """Return the values of a step or an evaluation that are shown: all of them where none is among the chosen metrics.

    Examples:
        >>> event = {"event": "evaluation", "step": 1, "eval/loss": 1.0, "eval/f1": 0.5, "eval/f1/low": 0.4, "eval/rows": 9.0}
        >>> displayed(event, ["f1"])
        {'eval/loss': 1.0, 'eval/f1': 0.5, 'eval/f1/low': 0.4}
    """
    values = {k: v for k, v in event.items() if k not in HIDDEN}
    if ALL in metrics or event["event"] not in ("step", "evaluation"):
        return values
    wanted = {*ALWAYS, *metrics}
    names = wanted | {f"{name}/{end}" for name in wanted for end in ENDS}
    # An evaluation names its rows in front: eval/loss.
    bare = {k: k.partition("/")[2] if event["event"] == "evaluation" else k for k in values}
    return {k: v for k, v in values.items() if bare[k] in names} or values


def event_text(event: dict[str, Any], metrics: Sequence[str] = (ALL,)) -> str:
    """Return an event in one line, printable."""
    kind = event["event"]
    if kind == "warning":
        return message_text(f"warning: {event['message']}")
    if kind == "save":
        return f"saved {event['path']}"
    if kind == "sample":
        return message_text(f"sample: {event['prompt']!r} -> {event['answer']!r}")
    values = shown(displayed(event, metrics), number)
    pairs = message_text("  ".join(f"{k} {v}" for k, v in values.items()))
    return pairs if kind == "step" else f"{kind}: {pairs}"


class Panel:
    """A live panel: progress with the time left, the loss curve, the newest metrics, the newest messages."""

    def __init__(self, steps: int | None, stream: TextIO, metrics: Sequence[str] = (ALL,)):
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.console, self.metrics = Console(file=stream), metrics
        clock = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self.progress = Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(), *clock, console=self.console)
        self.task = self.progress.add_task("step", total=steps)
        self.losses: list[float] = []
        self.newest: dict[str, dict[str, Any]] = {}
        self.live = Live(self.render(), console=self.console, refresh_per_second=4)
        self.live.start()

    def show(self, event: dict[str, Any], replay: bool = False) -> None:
        """See `Display.show`."""
        kind = event["event"]
        if kind in ("step", "evaluation"):
            self.newest[kind] = displayed(event, self.metrics)
            self.progress.update(self.task, completed=event["step"])
        if kind == "step" and isinstance(event.get("loss"), int | float):
            self.losses.append(float(event["loss"]))
        if kind in ("warning", "save", "sample") and not replay:
            self.console.print(f"step {event['step']}  {event_text(event)}", markup=False)
        self.live.update(self.render())

    def render(self) -> RenderableType:
        """Return the current panel."""
        from rich.console import Group
        from rich.panel import Panel as Box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, show_header=False)
        for kind, values in self.newest.items():
            texts = list(shown(values, number).items())
            for start in range(0, len(texts), 4):
                cells = [Text.assemble((f"{k} ", "dim"), (v, "bold")) for k, v in texts[start : start + 4]]
                table.add_row(Text(kind if start == 0 else "", style="cyan"), *cells)
        curve = Text(sparkline(self.losses), style="green")
        if self.losses:
            curve.append(f"  {number(self.losses[0])} -> {number(self.losses[-1])}", style="dim")
        return Box(Group(self.progress, curve, table), title="llmrecipe", title_align="left", expand=False)

    def expect(self, steps: int) -> None:
        """See `Display.expect`."""
        self.progress.update(self.task, total=steps)

    def close(self) -> None:
        """See `Display.close`."""
        self.live.update(self.render())
        self.live.stop()
