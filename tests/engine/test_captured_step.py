"""What is done around a CUDA graph, by stand-ins for torch: in which order, on which stream, and after a failure."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import import_utils

from llmrecipe.engine import captured_step
from llmrecipe.engine.captured_step import WARM, captured

PLACE = torch.device("cuda", 1)


class Stream:
    """A stream that says whom it waits for."""

    def __init__(self, name: str, said: list[Any]):
        self.name, self.said = name, said

    def wait_stream(self, other: Stream) -> None:
        self.said.append(f"{self.name} waits for {other.name}")


class Cuda:
    """torch.cuda, as far as a capture uses it.

    Args:
        ends: what the end of a recording that has failed raises.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ends: Exception | None = None):
        self.said: list[Any] = []
        self.default, self.side = Stream("default", self.said), Stream("side", self.said)
        self.current, self.place, self.waits, self.recording, self.ends = self.default, 0, 0, False, ends
        self.pools: set[Any] = set()
        for name in ("device", "current_device", "current_stream", "set_stream", "stream", "graph", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.side)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.waits)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(self, "waits", mode))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_pool, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *own: self.said.append(("released", *own)), raising=False)
        monkeypatch.setattr(captured_step, "_failed", [])
        captured_step._stream.cache_clear()

    @contextlib.contextmanager
    def device(self, place: torch.device) -> Iterator[None]:
        before, self.place = self.place, place.index
        yield
        self.place = before

    def current_device(self) -> int:
        return self.place

    def current_stream(self) -> Stream:
        return self.current

    def set_stream(self, stream: Stream) -> None:
        self.current = stream

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def graph_pool_handle(self) -> str:
        return "pool"

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        """As torch's own: neither stream nor allocator come back where the end of a recording fails."""
        assert graph is self and capture_error_mode == "thread_local"
        before, self.current, self.recording = self.current, stream, True
        self.pools.add(pool)
        try:
            yield
        finally:
            self.recording = False
            if self.ends is not None:
                raise self.ends
            self.pools.remove(pool)
            self.current = before

    def end_pool(self, place: int, pool: Any) -> None:
        if pool not in self.pools:
            raise RuntimeError("not currently recording to mempool_id")
        self.pools.remove(pool)

    def replay(self) -> None:
        self.said.append("replay")


def test_a_step_is_warm_before_it_is_recorded_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, passes = Cuda(monkeypatch), []

    def compute() -> Tensor:
        passes.append((cuda.current.name, cuda.place, cuda.waits, cuda.recording, import_utils.is_tracing()))
        return torch.zeros(1)

    replay = captured(compute, PLACE)
    assert passes == [
        *[("side", 1, 0, False, True)] * (WARM - 1),
        ("side", 1, "error", False, True),
        ("side", 1, 0, True, False),
    ]
    assert cuda.said == ["side waits for default", "default waits for side"]
    assert cuda.current is cuda.default and cuda.place == 0 and not captured_step._failed
    assert replay() is replay() and cuda.said[2:] == ["replay", "replay"]
    assert not import_utils.is_tracing()


def test_streams_are_not_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS keeps a workspace for every stream that it has been called on."""
    Cuda(monkeypatch)
    made: list[int] = []
    side = torch.cuda.Stream(0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: (made.append(device), side)[1])
    for place in (PLACE, PLACE, torch.device("cuda", 0)):
        captured(lambda: torch.zeros(1), place)
    assert made == [1, 0]


def test_what_waits_for_the_device_is_never_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, passes = Cuda(monkeypatch), []

    def compute() -> Tensor:
        passes.append(cuda.recording)
        if cuda.waits == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        captured(compute, PLACE)
    assert passes == [False] * WARM and not captured_step._failed
    assert cuda.current is cuda.default and cuda.waits == 0 and not import_utils.is_tracing()


@pytest.mark.parametrize("broken", [True, False])
def test_a_recording_that_fails_leaves_nothing_behind(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says what failed first: the end of a broken recording fails too, with words that name nothing."""
    cuda = Cuda(monkeypatch, RuntimeError("operation failed due to a previous error during capture") if broken else None)

    def compute() -> Tensor:
        if cuda.recording:
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        captured(compute, PLACE)
    assert cuda.current is cuda.default and not cuda.pools
    assert cuda.said[2:] == ([("released", 1, "pool")] if broken else [])
    assert captured_step._failed == [cuda]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs of a GPU")
def test_a_gpu_replays_a_step_and_survives_one_that_cannot_be_recorded() -> None:
    place = torch.device("cuda", 0)
    x = torch.ones(4, device=place)
    weight = torch.eye(4, device=place)

    def steady() -> Tensor:
        return (x @ weight) * 2

    replay = captured(steady, place)
    for value in (1.0, 3.0):
        x.fill_(value)
        assert replay().tolist() == [2 * value] * 4

    def reading() -> Tensor:
        return x * float(x.sum())

    with pytest.raises(RuntimeError, match="synchronizing"):
        captured(reading, place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured_step, "_without_waiting", contextlib.nullcontext)
        with pytest.raises(RuntimeError):
            captured(reading, place)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    x.fill_(2.0)
    assert captured(steady, place)().tolist() == [4.0] * 4 == replay().tolist()
    torch.cuda.empty_cache()
