"""What a kill leaves on the disk: the state of a folder before each call that changes a file system.

A process that is killed between two calls leaves exactly the files as they are then: what it had written reaches the reader,
what lay in its buffers does not. One recorded run therefore yields every state that a kill can leave, `Death` shows for some of
them that a killed process leaves the same, and a state is tried once however many calls meet it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CALLS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"})
"""Audit events of the interpreter that come before a change of the file system; opening counts where it is for writing."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
TICK = 0.05
"""Seconds within which two versions of a file may carry one time."""
State = dict[str, str]
"""Path -> hash of the content; `dir`, or `-> target` of a link."""


def watch(act: Callable[[str, str], None]) -> None:
    """Call `act(event, path)` before each change of the file system, in this process and those forked from it."""
    inside = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal inside
        if event not in CALLS or inside:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
            return
        inside = True
        try:
            act(event, os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else str(arguments[0]))
        finally:
            inside = False

    sys.addaudithook(hook)


def concerns(work: Path, path: str) -> bool:
    """Return whether a call's path is in a folder; a bare name, given with the handle of its folder, may be."""
    return os.path.abspath(path).startswith(f"{work}{os.sep}")


class Recorder:
    """Keeps the state of a folder whenever it changed, in the order of the calls.

    Args:
        work: the folder.
        store: keeps `states.jsonl` and the contents of files by their hashes.
    """

    def __init__(self, work: Path, store: Path):
        self.work, self.store = work, store
        self.known: dict[tuple[str, int, int, int], str] = {}
        store.mkdir(parents=True, exist_ok=True)

    def state(self, event: str, path: str) -> None:
        """Keep the state before a call."""
        if not concerns(self.work, path):
            return
        with open(self.store / "states.jsonl", "a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            entry = {"call": f"{event} {os.path.relpath(path, self.work)}", "state": self.read(), "written": self.written()}
            file.write(json.dumps(entry) + "\n")

    def read(self) -> State:
        """Return the folder's state, its contents kept in the store."""
        return {name: self._content(Path(path)) for name, path in _walk(self.work)}

    def written(self) -> dict[str, int]:
        """Return when each file was last written, in nanoseconds."""
        return {name: os.stat(path).st_mtime_ns for name, path in _walk(self.work) if os.path.isfile(path)}

    def _content(self, path: Path) -> str:
        if path.is_symlink():
            return f"-> {os.readlink(path)}"
        if path.is_dir():
            return "dir"
        facts = path.stat()
        key = (str(path), facts.st_mtime_ns, facts.st_size, facts.st_ino)
        if key not in self.known:
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if not (kept := self.store / digest).exists():
                kept.write_bytes(data)
            if time.time() - facts.st_mtime < TICK:
                return digest
            self.known[key] = digest
        return self.known[key]


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    for root, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            path = os.path.join(root, name)
            yield os.path.relpath(path, folder), path


class Death:
    """Kills the process before the call of a number that concerns a folder."""

    def __init__(self, work: Path, number: int):
        self.work, self.left = work, number

    def call(self, event: str, path: str) -> None:
        """Count a call, and kill the process at the last one."""
        if concerns(self.work, path):
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Point:
    """A state that a kill can leave."""

    call: str
    """The call it comes before."""
    number: int
    """How many calls came before that one."""
    state: State
    torn: str | None = None
    """A file of which only half of what was last written to it is there."""

    def restore(self, work: Path, store: Path) -> None:
        """Make a folder what it was."""
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        for name, content in self.state.items():
            path = work / name
            if content == "dir":
                path.mkdir()
            elif content.startswith("-> "):
                path.symlink_to(content[3:])
            else:
                shutil.copyfile(store / content, path)


def points(store: Path, start: State) -> list[Point]:
    """Return every state once, and after each the states in which the last thing written to a file is there in part only.

    Args:
        start: the state before the command.
    """
    found: list[Point] = []
    seen: set[str] = set()
    before = start
    for number, line in enumerate((store / "states.jsonl").read_text(encoding="utf-8").splitlines()):
        entry = json.loads(line)
        for point in (*_partial(before, entry, number, store), Point(entry["call"], number, entry["state"])):
            key = json.dumps(point.state, sort_keys=True)
            if key not in seen:
                seen.add(key)
                found.append(point)
        before = entry["state"]
    return found


def _partial(before: State, entry: dict[str, Any], number: int, store: Path) -> Iterator[Point]:
    """Yield the states between two calls: lines of a log there up to each one, and half of the last one; half of a new file.

    What was written to other files later than to this one, or in the same tick of the file system's clock, is not there yet.
    """
    for name, content in entry["state"].items():
        # A content that was there under another name has been renamed, not written.
        if content in before.values() or content == "dir" or content.startswith("-> "):
            continue
        new = (store / content).read_bytes()
        old = (store / before[name]).read_bytes() if name in before else b""
        if not new.startswith(old) or len(new) - len(old) < 2:
            continue
        ends = [i + 1 for i in range(len(old), len(new) - 1) if new[i : i + 1] == b"\n"] if name.endswith(".jsonl") else []
        last = ends[-1] if ends else len(old)
        for cut in (*ends, (last + len(new)) // 2):
            digest = hashlib.sha256(new[:cut]).hexdigest()
            (store / digest).write_bytes(new[:cut])
            earlier = {k: v for k, v in entry["state"].items() if not _later(k, name, before, entry)}
            reverted = {k: before[k] for k in entry["state"] if k not in earlier and k in before}
            yield Point(entry["call"], number, {**earlier, **reverted, name: digest}, torn=name)


def _later(name: str, torn: str, before: State, entry: dict[str, Any]) -> bool:
    """Return whether a file was written since the state before, and no earlier than the one that is there in part."""
    written = entry["written"]
    changed = name in written and before.get(name) != entry["state"][name]
    return changed and name != torn and written[name] >= written[torn]
