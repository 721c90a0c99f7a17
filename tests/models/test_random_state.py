"""What is drawn inside leaves the run's own streams alone, and only those of the device in use are looked at."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmrecipe.models.random_state import random_state_kept


def test_draws_inside_leave_the_stream_as_it_was() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    with random_state_kept(torch.device("cpu")):
        torch.manual_seed(0)
        torch.rand(7)
    assert torch.equal(torch.rand(4), wanted)


@pytest.mark.parametrize(("device", "looked_at"), [("cpu", []), ("cuda:1", [torch.device("cuda:1")])])
def test_other_gpus_of_the_machine_are_not_touched(device: str, looked_at: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: asked.append(list(devices)))
    random_state_kept(torch.device(device))
    assert asked == [looked_at]
