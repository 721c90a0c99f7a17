"""An evaluation leaves random generators as they were, also that of a GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmrecipe.training import evaluate as module


def test_the_generators_of_host_and_gpu_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    place, state = torch.device("cuda", 1), {"gpu": torch.tensor([7])}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state["gpu"] if device == place else None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda given, device: state.update(gpu=given))

    def batches(*given: Any) -> Any:
        state["gpu"] = torch.tensor([8])
        torch.rand(3)
        return iter(())

    monkeypatch.setattr(module, "_batches", batches)
    monkeypatch.setattr(module, "generated", lambda *given: ([], {}))
    objective = SimpleNamespace(finish_evaluation=lambda metrics, joined: {}, tasks=lambda: None)
    roles = SimpleNamespace(device=place, seed=0, evaluating=contextlib.nullcontext)
    evaluation: Any = SimpleNamespace(
        objective=objective, roles=roles, runtime=SimpleNamespace(world=1), samples=0, row_by_row=False, breakdown=None
    )
    before = torch.get_rng_state()
    assert module.evaluate(evaluation, []) == {}
    assert torch.equal(torch.get_rng_state(), before) and state["gpu"].tolist() == [7]
