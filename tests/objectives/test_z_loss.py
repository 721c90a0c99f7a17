"""The penalty on the softmax's denominators: value and gradient in float64, and what training with it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.methods._base.stack import Stack
from llmrecipe.objectives.pretraining.clm import Clm
from tests.tiny import roles_for, tiny_model
from tests.trainings import events, train_recipe

ROWS: list[dict[str, Any]] = [
    {"ids": [5, 9, 3, 44, 7], "trained": [0, 1, 1, 1, 1], "row": 4, "bytes": 9, "words": 2},
    {"ids": [6, 21, 40], "trained": [0, 1, 1], "row": 0, "bytes": 5, "words": 1},
]
WEIGHT = 0.03


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_the_penalty_and_its_gradient_are_those_of_plain_logits(packing: bool, frozen: bool) -> None:
    model = tiny_model().double()
    model.get_output_embeddings().requires_grad_(not frozen)
    roles, objective = roles_for(model, Stack([]), packing), Clm(z_loss=WEIGHT)
    loss = objective.training_loss(objective.collate(ROWS, roles), roles)
    likelihood, squares = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for row in ROWS:
        logits = model(torch.tensor([row["ids"]])).logits[0, :-1]
        log_z = logits.exp().sum(-1).log()
        likelihood += (log_z - logits.gather(-1, torch.tensor(row["ids"][1:])[:, None])[:, 0]).sum()
        squares += log_z.square().sum()
    assert float(loss.total.detach()) == pytest.approx(float(likelihood.detach()), rel=1e-9), (
        "the reported loss is without the penalty"
    )
    assert float(torch.as_tensor(loss.auxiliary).detach()) == pytest.approx(WEIGHT * float(squares.detach()), rel=1e-9)
    total, count = loss.metrics["log_z_squared"]
    assert (float(total), count) == (pytest.approx(float(squares.detach()), rel=1e-9), 6.0)
    weights = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss.total + loss.auxiliary, weights)
    for own, other in zip(found, torch.autograd.grad(likelihood + WEIGHT * squares, weights), strict=True):
        torch.testing.assert_close(own, other, atol=1e-9, rtol=1e-7)


def test_it_is_added_to_what_a_mixture_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    roles, objective = roles_for(tiny_model(), Stack([]), False), Clm(z_loss=WEIGHT)
    batch = objective.collate(ROWS, roles)
    alone = objective.training_loss(batch, roles)
    engine = roles.prepared
    monkeypatch.setattr(roles, "prepared", lambda *args, **options: engine(*args, **options) | {"auxiliary": torch.tensor(0.5)})
    both = objective.training_loss(batch, roles)
    added = [float(torch.as_tensor(loss.auxiliary).detach()) for loss in (both, alone)]
    assert added[0] == pytest.approx(added[1] + 0.5 * 6)


def test_training_with_it_lowers_the_denominators(tmp_path: Path) -> None:
    words = ["steps=8", "batch.size=4", "eval.batches=2", "optim.lr=1e-3"]
    last = {}
    for weight in ("0.0", "0.1"):
        train_recipe(tmp_path / weight, "clm", *words, f"objective.z_loss={weight}")
        last[weight] = events(tmp_path / weight)
    assert "log_z_squared" not in last["0.0"][0]
    assert last["0.1"][-1]["log_z_squared"] < 0.5 * last["0.1"][0]["log_z_squared"]
    assert last["0.1"][0]["loss"] == pytest.approx(last["0.0"][0]["loss"], rel=1e-5)
    assert events(tmp_path / "0.1", "evaluation")[-1].keys() == events(tmp_path / "0.0", "evaluation")[-1].keys()
