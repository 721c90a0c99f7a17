"""A computation over tensors that stay in their places, captured as a CUDA graph.

Every kernel of a pass is recorded once, with the addresses that it reads and writes, and one call starts all of them again.
Whatever Python decided while it was recorded stays decided, and what waits for the device cannot be recorded.

Source: CUDA graphs, as PyTorch's documentation describes them (`torch.cuda.CUDAGraph`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM = 2
"""Passes before it is recorded, in which libraries choose their kernels and allocate what they keep."""


def captured(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return what replays a computation on the current CUDA device; each call overwrites the result of the one before.

    Args:
        compute: the same when it is called several times, and without a value that the host reads.

    Raises:
        RuntimeError: something in it cannot be recorded.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as one that pins batches, may go on calling CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = compute()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
