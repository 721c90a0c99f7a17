"""A computation over tensors that stay in their places, captured as a CUDA graph.

Every kernel of a pass is recorded once, with the addresses that it reads and writes, and one call starts all of them again.
Whatever Python decided while it was recorded stays decided, and what waits for the device cannot be recorded.

A recording that fails leaves torch's allocators and streams as they were in the middle of it, so what would make it fail is
looked for before: the last pass that is not recorded may not wait for the device either.

Source: CUDA graphs, as PyTorch's documentation describes them (`torch.cuda.CUDAGraph`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.utils import import_utils

WARM = 2
"""Passes before it is recorded, in which libraries choose their kernels and allocate what they keep."""
_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose recording failed: torch's allocator of pinned memory goes on asking them."""


def captured(compute: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Return what replays a computation on a CUDA device; each call overwrites the result of the one before.

    Args:
        compute: the same when it is called several times, and without a value that the host reads.

    Raises:
        RuntimeError: something in it cannot be recorded.
    """
    with torch.cuda.device(device):
        stream, before = _stream(torch.cuda.current_device()), torch.cuda.current_stream()
        stream.wait_stream(before)
        with torch.cuda.stream(stream), _as_while_recording():
            for _ in range(WARM - 1):
                compute()
            with _without_waiting():
                compute()
        before.wait_stream(stream)
        return _recorded(compute, stream, before)


def _recorded(compute: Callable[[], Tensor], stream: torch.cuda.Stream, before: torch.cuda.Stream) -> Callable[[], Tensor]:
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    first: Exception | None = None
    try:
        # Other threads, such as one that pins batches, may go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                out = compute()
            except Exception as error:
                first = error
                raise
    except Exception as error:
        _failed.append(graph)
        ends: Any = torch._C
        with contextlib.suppress(RuntimeError):  # it has ended, where the end of the recording has not failed too
            ends._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            ends._cuda_releasePool(torch.cuda.current_device(), pool)
        # What comes after it says no more than that something failed.
        raise first or error from None
    finally:
        torch.cuda.set_stream(before)

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """Return the stream of a device on which steps are recorded; libraries keep a workspace for each they were called on."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _without_waiting() -> Iterator[None]:
    """Make it an error, inside, that the host waits for a device.

    Raises:
        RuntimeError: it would have waited.
    """
    known = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(known)


@contextlib.contextmanager
def _as_while_recording() -> Iterator[None]:
    """Have Transformers decide inside as it does while a step is recorded, when it looks at no values."""
    known = import_utils.is_cuda_stream_capturing
    import_utils.is_cuda_stream_capturing = lambda: True
    try:
        yield
    finally:
        import_utils.is_cuda_stream_capturing = known
