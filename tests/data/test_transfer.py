"""Copies for which the host does not wait, on GPUs that are not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmrecipe.data.transfer import Arriving


def test_numbers_of_a_gpu_are_here_when_its_own_stream_has_copied_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever GPU is the current one, and of two GPUs both."""
    recorded: list[Any] = []
    waited: list[Any] = []

    class Event:
        def record(self, stream: Any = "of the current device") -> None:
            recorded.append(stream)
            self.stream = stream

        def synchronize(self) -> None:
            waited.append(self.stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    with FakeTensorMode():
        first, second = (torch.ones((), device=f"cuda:{place}") for place in (0, 1))
        arriving = Arriving([2.0, first, second, first])
    assert recorded == ["of cuda:0", "of cuda:1"]
    copies = [torch.tensor([5.0, 6.0]), torch.tensor([7.0])]
    arriving.groups = [(places, copy) for (places, _), copy in zip(arriving.groups, copies, strict=True)]
    assert arriving.values() == arriving.values() == [2.0, 5.0, 7.0, 6.0]
    assert waited == ["of cuda:0", "of cuda:1"]


def test_numbers_of_the_host_are_here() -> None:
    assert Arriving([1.5, torch.tensor(2.5), torch.tensor([3])]).values() == [1.5, 2.5, 3.0]
