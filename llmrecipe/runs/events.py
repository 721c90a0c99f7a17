"""Events: one JSON object per line in `events.jsonl`, the only source of tables and plots.

    {"event": "step", "step": 1, "loss": 2.3, "lr": 0.0002, "grad_norm": 0.9, "tokens": 512, "tokens_per_s": 900.0, ...}
    {"event": "evaluation", "step": 50, "eval/loss": 2.1, ...}
    {"event": "sample", "step": 50, "prompt": "...", "answer": "..."}
    {"event": "save", "step": 200, "path": "checkpoints/step-000200"}
    {"event": "warning", "step": 7, "message": "..."}
    {"event": "check", "step": 0, "loss": 0.6931, "loss/wanted": 0.6931, ...}

Lines are flushed one by one. A resumed run truncates the file after the checkpoint it continues from, so each step occurs once.
NaN and infinities, which JSON does not have, are written as null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from llmrecipe.core.errors import RunError
from llmrecipe.core.redact import redact
from llmrecipe.runs.progress_display import Display, display
from llmrecipe.runs.tracker import OpenTracker, numbers_of, open_trackers

FILE = "events.jsonl"
KINDS = ("step", "evaluation", "sample", "save", "warning", "check")


class Events:
    """Event log of a run. Every event goes to the file, to the screen and to the trackers.

    Args:
        folder: the run directory; None on processes that do not report, whose events go nowhere.
        live: `auto` (a live display when a person watches), `on` or `off`.
        steps: length of the run, for the estimate of the remaining time.
        trackers: names of trackers to mirror to.
        config: the composed recipe, for the trackers.
    """

    def __init__(
        self,
        folder: Path | None,
        live: str = "auto",
        steps: int | None = None,
        trackers: Iterable[str] = (),
        config: dict[str, Any] | None = None,
    ):
        self.path = folder / FILE if folder is not None else None
        self.last_step = 0
        self.screen: Display | None = display(live, steps) if folder is not None else None
        self.trackers: list[OpenTracker] = open_trackers(trackers, folder, redact(config or {})) if folder is not None else []
        self._file = open(self.path, "a", encoding="utf-8") if self.path is not None else None  # noqa: SIM115 (see close)

    def step(self, step: int, **values: Any) -> None:
        """Report one optimizer step: loss, lr, grad_norm, tokens, tokens_per_s, peak_mem_mb and the objective's metrics."""
        self._emit("step", step, values)

    def evaluation(self, step: int, **metrics: Any) -> None:
        """Report metrics of a split after `step` steps, named `eval/...` or `test/...`."""
        self._emit("evaluation", step, metrics)

    def sample(self, step: int, prompt: str, answer: str, **facts: Any) -> None:
        """Report a generated answer."""
        self._emit("sample", step, {"prompt": prompt, "answer": answer, **facts})

    def save(self, step: int, path: str) -> None:
        """Report that a checkpoint was written; the path is relative to the run directory."""
        self._emit("save", step, {"path": path})

    def warning(self, message: str, step: int | None = None) -> None:
        """Report something the user should know; the run goes on."""
        self._emit("warning", self.last_step if step is None else step, {"message": message})

    def check(self, step: int, **values: Any) -> None:
        """Report what was verified or counted before the first step, each measured value with its expected one."""
        self._emit("check", step, values)

    def expect(self, steps: int) -> None:
        """Set the length, when it is known only later or a new part with its own length begins."""
        if self.screen is not None:
            self.screen.expect(steps)

    def resume(self, step: int) -> None:
        """Drop events after `step`: the run continues from the checkpoint of that step."""
        self.last_step = step
        if self.path is None or self._file is None:
            return
        self._file.close()
        truncate(self.path, step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (see close)
        if self.screen is not None:
            for event in read_events(self.path):
                self.screen.show(event, replay=True)

    def close(self) -> None:
        """Close the file, the display and the trackers; may be called twice."""
        if self.screen is not None:
            self.screen.close()
        for tracker in self.trackers:
            tracker.close()
        self.screen, self.trackers = None, []
        if self._file is not None:
            self._file.close()
            self._file = None

    def _emit(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self.last_step = max(self.last_step, step)
        if self._file is None:
            return
        event = redact({"event": kind, "step": step, **{k: plain(v) for k, v in values.items()}})
        try:
            self._file.write(json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror or error}; the last checkpoint is intact") from error
        if self.screen is not None:
            self.screen.show(event)
        if kind in ("step", "evaluation"):
            for tracker in self.trackers:
                tracker.log(numbers_of(event), step)


def plain(value: Any) -> Any:
    """Return a value as JSON: tensors and numpy numbers become Python's, numbers that JSON lacks become null."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    elif hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def read_events(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the events of a run (its folder, or the file), optionally of one kind; an incomplete last line is skipped.

    Raises:
        RunError: there are no events, or a line in the middle is damaged.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise RunError(f"{path} has no {FILE}: not a run directory, or the run has not begun")
    return [event for event in _parse(file) if kind is None or event.get("event") == kind]


def _parse(file: Path) -> Iterator[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise RunError(f"{file}:{number}: this line is not JSON ({error})") from error


def truncate(path: Path, step: int, always: Container[str] = ()) -> None:
    """Keep the events up to and including a step, in one atomic replacement.

    Args:
        path: `events.jsonl`.
        step: the last step whose events are kept.
        always: kinds of events that are kept whatever their step is.
    """
    if not path.is_file():
        return
    kept = [e for e in _parse(path) if e.get("step", 0) <= step or e.get("event") in always]
    aside = path.with_name(f".{path.name}.writing")
    with open(aside, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(event, ensure_ascii=False) + "\n" for event in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
