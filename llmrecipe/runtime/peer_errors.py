"""Errors of one process among several: which process reports an error, and what the others say that have lost it.

Most errors are met by all processes alike, and process 0 reports them for all. One that a single process meets (its rows, its
disk, the server that it reads) would end the run without a word if only process 0 spoke.
"""

from __future__ import annotations

import time

import torch.distributed as dist

from llmrecipe.core.errors import LlmRecipeError, RunError

KEY = "llmrecipe/error"
"""Where process 0 leaves its message in the store through which the processes met."""
WAIT = 3.0
"""Seconds that the others wait for it: processes that meet an error alike meet it at nearly the same time."""
BROKEN = ("closed by peer", "reset by peer", "broken pipe")
"""What gloo says, which raises no class of its own, when the process at the other end is gone."""


def reported(error: Exception, rank: int, world: int) -> Exception:
    """Return an error as this process is to report it, with `LlmRecipeError.process` set where it is the one to do so.

    A collective that fails because another process has ended becomes a `RunError` that says so.
    """
    if world == 1:
        return error
    lost = isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in BROKEN)
    )
    if lost:
        error = RunError(
            "another process of this run has ended or cannot be reached, so this one cannot go on; what that process printed "
            "last says why, or its exit code where it could not print (-9: killed, mostly for memory)"
        )
    if not isinstance(error, LlmRecipeError):
        return error
    said = _said_by_main(str(error), rank)
    if (said is None) if lost else said != str(error):
        error.process = f"process {rank} of {world}"
    return error


def _said_by_main(text: str, rank: int) -> str | None:
    """Return the message of process 0, None where it has left none in time; process 0 leaves its own."""
    try:
        store = dist.distributed_c10d._get_default_store()
        if rank == 0:
            store.set(KEY, text)
            return text
        over = time.monotonic() + WAIT
        while not store.check([KEY]):  # its own wait prints warnings when nothing comes
            if time.monotonic() > over:
                return None
            time.sleep(0.05)
        return store.get(KEY).decode()
    except (RuntimeError, ValueError):  # the process that keeps the store has ended, or there is none
        return None
