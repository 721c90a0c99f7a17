"""Kill a command at every file-system call, give it again, and compare what it leaves with what an untouched one leaves."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import disk, server
from tests.golden.runs import differences, outcome

UNEVENTFUL = ("warning",)
"""Events that a damaged file adds."""


@dataclass
class Sweep:
    """Every state a command can be killed in.

    Args:
        words: the command; it runs in an empty folder and writes its run to `run`.
        folder: for the working folder and the recorded states.
        files: path -> text of files that are there at the start.
        cached: the caches are filled at the start, so that no state of filling them is among those of the command.
    """

    words: Sequence[str]
    folder: Path
    files: dict[str, str] = field(default_factory=dict)
    cached: bool = False

    def __post_init__(self) -> None:
        self.work, self.store, self.caches = (self.folder / name for name in ("work", "states", "caches"))
        self._empty()
        if self.cached:
            code, output = server.command(self.words, self.work)
            assert code == 0, output
            (self.work / server.CACHE).rename(self.caches)
            self._empty()
        start = disk.Recorder(self.work, self.store).read()
        code, output = server.command(self.words, self.work, record=self.store)
        assert code == 0, output
        self.whole = left(self.work)
        self.points = disk.points(self.store, start)

    def _empty(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        if self.caches.exists():
            shutil.copytree(self.caches, self.work / server.CACHE, symlinks=True)
        for name, text in self.files.items():
            (self.work / name).parent.mkdir(parents=True, exist_ok=True)
            (self.work / name).write_text(text, encoding="utf-8")

    def is_done(self) -> bool:
        """Return whether the run says that it is finished."""
        status = self.work / "run" / "status.json"
        return status.is_file() and json.loads(status.read_text(encoding="utf-8"))["status"] == "done"

    def go_on(self) -> tuple[int, str]:
        """Give the same command again, or the one its message names."""
        code, output = server.command(self.words, self.work)
        if code == 2 and (named := re.search(r"resume=([^\s,]*)", "".join(output.split("\n")))):
            code, output = server.command(["train", f"resume={named[1]}", "log.live=off"], self.work)
        return code, output

    def wrong(self, point: disk.Point) -> str | None:
        """Kill at a point and go on; return what differs in the end from the command that was never killed."""
        point.restore(self.work, self.store)
        if not self.is_done():
            code, output = self.go_on()
        elif "left over" in left(self.work)["states"].values():
            # Given again, the command of a finished run is refused, and what its end did not delete any more is deleted.
            code, output = server.command(self.words, self.work)
            code = 0 if code == 2 and "contains a finished run" in output else code
        else:
            code, output = 0, ""
        where = f"before call {point.number} ({point.call}{f', {point.torn} in part' if point.torn else ''})"
        if code:
            return f"{where}: exit code {code}: {output[-600:]}"
        found = left(self.work)
        lines = differences(self.whole, found)
        lines += [f"{path} is {state}" for path, state in found["states"].items() if self.whole["states"].get(path) != state]
        return f"{where}: {'; '.join(lines)}" if lines else None

    def same_as_killed(self, point: disk.Point) -> bool:
        """Return whether a process that is really killed there leaves the recorded files."""
        self._empty()
        code, _ = server.command(self.words, self.work, die_at=point.number)
        names = {name for name, _ in disk._walk(self.work)}
        return code == -9 and names == point.state.keys()


def left(work: Path) -> dict[str, Any]:
    """Return what a command left: events, results, the state of each run, and half-written files that nobody removed."""
    found = outcome(work)
    found["events"] = {
        place: [event for event in events if event["event"] not in UNEVENTFUL] for place, events in found["events"].items()
    }
    states = {
        path.parent.relative_to(work).as_posix(): json.loads(path.read_text(encoding="utf-8"))["status"]
        for path in sorted(work.rglob("status.json"))
    }
    asides = [p.relative_to(work).as_posix() for p in sorted(work.rglob(".*")) if ".writing" in p.name or ".replaced" in p.name]
    return found | {"states": {**states, **dict.fromkeys(asides, "left over")}}
