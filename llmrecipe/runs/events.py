"""Events: one JSON object per line in `events.jsonl`, the only source of tables and plots.

    {"event": "step", "step": 1, "loss": 2.3, "lr": 0.0002, "grad_norm": 0.9, "tokens": 512, "tokens_per_s": 900.0, ...}
    {"event": "evaluation", "step": 50, "eval/loss": 2.1, ...}
    {"event": "sample", "step": 50, "prompt": "...", "answer": "..."}
    {"event": "save", "step": 200, "path": "checkpoints/step-000200"}
    {"event": "warning", "step": 7, "message": "..."}
    {"event": "check", "step": 0, "loss": 0.6931, "loss/wanted": 0.6931, ...}
    {"event": "memory", "step": 1, "weights": 7881856, "weights/predicted": 7881856, ...}

Lines are flushed one by one. A checkpoint records how many lines there were before it; a resumed run keeps these and no others,
so that each event occurs once. A damaged line is set aside: readers skip it with a warning, a resumed run moves it to
`events.damaged`. NaN and infinities, which JSON does not have, are written as null.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Any

from llmrecipe.core.errors import RunError
from llmrecipe.core.redact import redact
from llmrecipe.runs.durable import unfinished_path
from llmrecipe.runs.json_lines import read_lines
from llmrecipe.runs.progress_display import ALL, Display, display
from llmrecipe.runs.tracker import OpenTracker, numbers_of, open_trackers

FILE = "events.jsonl"
DAMAGED = "events.damaged"
"""File of the lines that a resumed run has set aside."""
TAIL = 1 << 16
"""Bytes at the end of the file that are searched for the last step first."""
TEXTS = {"sample": ("prompt", "answer"), "save": ("path",), "warning": ("message",)}
"""Kind -> the texts that every event of it holds."""
LARGEST = 2**63 - 1
"""Largest whole number of an event."""
KINDS = ("step", "evaluation", "sample", "save", "warning", "check", "memory")


class Events:
    """Event log of a run. Every event goes to the file, to the screen and to the trackers.

    Args:
        folder: the run directory; None on processes that do not report, whose events go nowhere.
        live: `auto` (a live display when a person watches), `on` or `off`.
        steps: length of the run, for the estimate of the remaining time.
        trackers: names of trackers to mirror to.
        config: the composed recipe, for the trackers.
        metrics: what the screen shows besides loss, learning rate and speed (see `display`).
    """

    def __init__(
        self,
        folder: Path | None,
        live: str = "auto",
        steps: int | None = None,
        trackers: Iterable[str] = (),
        config: dict[str, Any] | None = None,
        metrics: Sequence[str] = (ALL,),
    ):
        self.path = folder / FILE if folder is not None else None
        self.last_step = 0
        self.screen: Display | None = display(live, steps, metrics=metrics) if folder is not None else None
        self.trackers: list[OpenTracker] = open_trackers(trackers, folder, redact(config or {})) if folder is not None else []
        self._kept: Counter[str] = Counter()
        self._warned: set[str] = set()
        self._file = open(self.path, "a", encoding="utf-8") if self.path is not None else None  # noqa: SIM115 (see close)
        self._owed: Callable[[], None] | None = None

    def owe(self, report: Callable[[], None]) -> None:
        """Keep a report whose values are still on their way; it is made before anything else is reported (see `catch_up`)."""
        self.catch_up()
        self._owed = report

    def catch_up(self) -> None:
        """Make the report that is owed, if one is."""
        report, self._owed = self._owed, None
        if report is not None:
            report()

    def step(self, step: int, **values: object) -> None:
        """Report one optimizer step: loss, lr, grad_norm, tokens, tokens_per_s, peak_mem_mb and the objective's metrics."""
        self._emit("step", step, values)

    def evaluation(self, step: int, **metrics: object) -> None:
        """Report metrics of a split after `step` steps, named `eval/...`, `test/...`, `general/...` or `forget/...`."""
        self._emit("evaluation", step, metrics)

    def sample(self, step: int, prompt: str, answer: str, **facts: object) -> None:
        """Report a generated answer."""
        self._emit("sample", step, {"prompt": prompt, "answer": answer, **facts})

    def save(self, step: int, path: str) -> None:
        """Report that a checkpoint was written; the path is relative to the run directory."""
        self._emit("save", step, {"path": path})

    def warning(self, message: str, step: int | None = None, *, once: bool = False) -> None:
        """Report something the user should know; the run goes on. One that `keep_warnings` found is not reported again.

        Args:
            once: nor is it where this process has reported it before.
        """
        shown = redact({"message": message})["message"]
        if once and shown in self._warned:
            return
        self._warned.add(shown)
        if self._kept[shown]:
            self._kept[shown] -= 1
            return
        self._emit("warning", self.last_step if step is None else step, {"message": message})

    def keep_warnings(self) -> None:
        """Note the warnings of an earlier start, which work that starts again would report once more."""
        if self.path is not None:
            self._kept = Counter(str(event["message"]) for event in read_events(self.path, "warning"))

    def check(self, step: int, **values: object) -> None:
        """Report what was verified or counted before the first step, each measured value with its expected one."""
        self._emit("check", step, values)

    def memory(self, step: int, **parts: int) -> None:
        """Report the bytes of each part of the memory as the first update had them, with those that formulas give."""
        self._emit("memory", step, parts)

    def expect(self, steps: int) -> None:
        """Set the length, when it is known only later or a new part with its own length begins."""
        if self.screen is not None:
            self.screen.expect(steps)

    def mark(self) -> int:
        """Sync the file and return its number of lines, for a checkpoint (see `resume`); 0 on processes that do not report."""
        self.catch_up()
        if self.path is None or self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.path.read_bytes().count(b"\n")

    def resume(self, step: int, lines: int | None = None, saved: str | None = None) -> None:
        """Drop what was reported after a checkpoint: the run continues from there.

        Args:
            step: the checkpoint's; 0 where there is none.
            lines: what `mark` returned for it; None for a checkpoint without it, where the step alone decides.
            saved: path of the checkpoint, where its `save` event comes after these lines.
        """
        self.last_step = step
        if self.path is None or self._file is None:
            return
        self._file.close()
        damaged = truncate(self.path, step, lines)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (see close)
        if self.screen is not None:
            for event in read_events(self.path):
                self.screen.show(event, replay=True)
        if saved is not None and lines is not None:
            self._emit("save", step, {"path": saved}, replay=True)
        if damaged:
            self.warning(f"{FILE}: {damaged} damaged line{'s were' if damaged > 1 else ' was'} set aside in {DAMAGED}")

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

    def _emit(self, kind: str, step: int, values: dict[str, Any], replay: bool = False) -> None:
        self.catch_up()
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
            self.screen.show(event, replay=replay)
        if kind in ("step", "evaluation"):
            for tracker in self.trackers:
                tracker.log(numbers_of(event), step)


def plain(value: object) -> object:
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
    """Return the events of a run (its folder, or the file), optionally of one kind.

    A damaged line is skipped with a warning; an incomplete last line, which a running process is writing, silently.

    Raises:
        RunError: there are no events.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise RunError(f"{path} has no {FILE}: not a run directory, or the run has not begun")
    return [event for event in read_lines(file, parse, "an event") if kind is None or event["event"] == kind]


def parse(line: bytes) -> dict[str, Any] | None:
    """Return the event of a line, or None for a line that is empty, cut or damaged.

    Examples:
        >>> parse(b'{"event": "step", "step": 1}'), parse(b'{"event": "st'), parse(b'{"event": "step", "step": null}')
        ({'event': 'step', 'step': 1}, None, None)
    """
    try:
        event = json.loads(line.decode("utf-8"), parse_int=_count, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(event, dict) and isinstance(event.get("event"), str) and is_step(event.get("step"))):
        return None
    return event if all(isinstance(event.get(name), str) for name in TEXTS.get(event["event"], ())) else None


def is_step(value: object) -> bool:
    """Return whether a value read from a file is a number of steps."""
    return type(value) is int and 0 <= value <= LARGEST


def _count(digits: str) -> int:
    """Return a whole number of JSON that every reader of events can plot."""
    value = int(digits)
    if abs(value) > LARGEST:
        raise ValueError("a whole number of more than 64 bits")
    return value


def _finite(text: str) -> float:
    """Return a number of JSON that every reader of events can plot; NaN and infinities are written as null."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number that is not finite")
    return value


def last_step(folder: Path) -> int | None:
    """Return the step of a run's last step event, or None; of the file only the end is read, as far back as that event."""
    try:
        with open(folder / FILE, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            length = min(TAIL, size)
            while True:
                file.seek(size - length)
                lines = file.read(length).split(b"\n")
                events = (event for line in reversed(lines) if (event := parse(line)) is not None)
                found = next((int(event["step"]) for event in events if event["event"] == "step"), None)
                if found is not None or length == size:
                    return found
                length = min(4 * length, size)
    except OSError:
        return None


def truncate(path: Path, step: int, lines: int | None = None, always: Container[str] = ()) -> int:
    """Keep the first lines of the file, in one atomic replacement, and none of a later step; set damaged ones aside.

    Args:
        path: `events.jsonl`.
        step: the last step whose events are kept.
        lines: how many are kept; None keeps all up to and including the step.
        always: kinds of events that are kept whatever their step is.

    Returns:
        How many damaged lines were moved to `events.damaged`.
    """
    if not path.is_file():
        return 0
    content = path.read_bytes().split(b"\n")
    complete, cut = content[:-1], content[-1]
    first = [*complete, cut] if lines is None and parse(cut) else complete[:lines]
    events = [(line, parse(line)) for line in first if line]
    kept = [line for line, event in events if event is not None and (event["step"] <= step or event["event"] in always)]
    damaged = [line for line, event in events if event is None]
    if damaged:
        with open(path.with_name(DAMAGED), "ab") as file:
            file.writelines(line + b"\n" for line in damaged)
            file.flush()
            os.fsync(file.fileno())
    aside = unfinished_path(path)
    with open(aside, "wb") as file:
        file.writelines(line + b"\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    return len(damaged)
