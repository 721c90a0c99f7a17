"""Commands in forked processes: a server imports everything once and trains once, so that a command costs what it computes."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults import disk

OUTPUT = "output.txt"
CACHE = "cache"
"""Folder of the caches in the working folder."""
PRELOAD = "tests.faults.warm"


def command(words: Sequence[str], work: Path, record: Path | None = None, die_at: int | None = None) -> tuple[int, str]:
    """Run `llmrecipe WORDS` in a forked process; return its exit code (negative: the signal that killed it) and its output.

    Args:
        work: its working folder, which also holds its caches.
        record: folder for the states of the disk (`disk.Recorder`); None records nothing.
        die_at: the number of the file-system call before which the process kills itself.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    output = work.parent / OUTPUT
    process = context.Process(target=_run, args=(list(words), str(work), str(output), record and str(record), die_at))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, output.read_text(encoding="utf-8", errors="replace")


def _run(words: list[str], work: str, output: str, record: str | None, die_at: int | None) -> None:
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 (the process's own)
    os.chdir(work)
    os.environ["LLMRECIPE_CACHE"] = os.path.join(work, CACHE)
    if record is not None:
        disk.watch(disk.Recorder(Path(work), Path(record)).state)
    elif die_at is not None:
        disk.watch(disk.Death(Path(work), die_at).call)
    _leave(words)


def _leave(words: list[str]) -> None:
    """Run the command and leave the process without the clean-up of the process it was forked from."""
    from llmrecipe.cli import app

    code = 99
    try:
        code = app.run_command(words)
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(code)


def forked_stage(child: Any, planned: Any, continued: bool, enough: Any = None) -> int:
    """Run a pipeline's stage in a process forked from the pipeline's, in place of `subprocesses.execute`."""
    from llmrecipe.pipelines.subprocesses import command_of, say_of

    reader, writer = os.pipe()
    words = command_of(planned, continued)
    pid = os.fork()
    if pid == 0:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.environ.update(child.environment)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        _leave(words)
    os.close(writer)
    with open(reader, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            say_of(planned.name, line.rstrip("\n"))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
