"""IPO by hand, its value at step 0, where its margin ends, and parity with the reference trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmrecipe.methods._base.stack import Stack
from llmrecipe.objectives.alignment.dpo import Dpo
from llmrecipe.objectives.alignment.ipo import Ipo, ipo_loss, regulariser
from tests.objectives.parity import (
    PAIRS,
    arguments,
    assert_same,
    lora_config,
    mean_loss,
    ours,
    pair_dataset,
    share_weights,
    word_tokenizer,
)
from tests.tiny import roles_for, tiny_model


def test_squared_distance_by_hand() -> None:
    """rho_w = 0.4, rho_l = -0.1, beta = 0.5: (0.5 - 1)^2 = 0.25; a margin of 1 / (2 beta) costs nothing, more costs again."""
    loss = ipo_loss(torch.tensor([0.4, 1.0, 2.0]), torch.tensor([-0.1, 0.0, 0.0]), 0.5)
    torch.testing.assert_close(loss, torch.tensor([0.25, 0.0, 1.0]))


def test_regularisers_by_hand() -> None:
    r_w, r_l, mean = torch.tensor([3.0]), torch.tensor([-1.0]), torch.tensor([-0.7])
    assert float(regulariser(r_w, r_l, mean, "l2_logratio")) == pytest.approx(5.0)
    assert float(regulariser(r_w, r_l, mean, "identity")) == pytest.approx(16.0)
    assert float(regulariser(r_w, r_l, mean, "nll")) == pytest.approx(0.7)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_step_zero_is_a_quarter_over_beta_squared(average: bool, beta: float) -> None:
    roles = roles_for(tiny_model(), Stack([]))
    objective = Ipo(beta=beta, average=average)
    loss = float(mean_loss(objective, roles, PAIRS).detach())
    assert loss == pytest.approx(1 / (4 * beta**2), rel=1e-6)
    assert objective.step_zero()["loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("average", [True, False])
def test_each_answer_is_divided_by_its_own_length(average: bool) -> None:
    """The same numbers from plain log-softmax over whole logits."""
    model, roles = ours()
    got = float(mean_loss(Ipo(beta=0.2, average=average), roles, PAIRS).detach())
    base = tiny_model()
    wanted = []
    for row in PAIRS:
        rho = []
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            n, sums = len(row[side]), []
            for m in (model, base):
                with torch.no_grad():
                    t = m(ids).logits.double().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
                sums.append(float(t[-n:].sum()))
            rho.append((sums[0] - sums[1]) / (n if average else 1))
        wanted.append((rho[0] - rho[1] - 2.5) ** 2)
    assert got == pytest.approx(sum(wanted) / 3, rel=1e-5)


def overfit(objective: object, steps: int = 60) -> float:
    """The summed or averaged margin of one pair after training on it alone."""
    model = tiny_model()
    roles = roles_for(model, Stack([]))
    roles.stack.snapshot_reference(model)
    row = [{"row": 0, "prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10, 2], "rejected_ids": [11, 12, 13, 2]}]
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-3)
    batch = objective.collate(row, roles)  # type: ignore[attr-defined]
    for _ in range(steps):
        loss = objective.loss(batch, roles)  # type: ignore[attr-defined]
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.metrics["rewards/margins"][0]) / objective.beta  # type: ignore[attr-defined]


def test_the_margin_ends_at_its_target_where_that_of_dpo_goes_on() -> None:
    assert overfit(Ipo(beta=0.25, average=False)) == pytest.approx(2.0, abs=0.02)
    assert overfit(Dpo(beta=1.0)) > 4.0


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.1, 0.6])
def test_loss_and_gradients_equal_the_reference_trainer(beta: float, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    model, roles = ours()
    theirs = DPOTrainer(
        tiny_model(), args=DPOConfig(**arguments(tmp_path, 3, beta=beta, loss_type=["ipo"])), train_dataset=pair_dataset(),
        processing_class=word_tokenizer(), peft_config=lora_config(),
    )  # fmt: skip
    pairs = share_weights(theirs.model, model)
    batch = theirs.data_collator([theirs.train_dataset[i] for i in range(3)])
    assert_same(mean_loss(Ipo(beta=beta), roles, PAIRS), theirs.compute_loss(theirs.model, dict(batch)), pairs)
