"""ORPO by hand, its logarithms at both ends, and parity with the reference trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.methods._base.stack import Stack
from llmrecipe.objectives.alignment.orpo import Orpo, log_odds_ratio, orpo_loss
from llmrecipe.objectives.token_math import log1mexp
from tests.objectives.parity import (
    PAIRS,
    answer_tensors,
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

ENDS = [-1e-7, -1e-4, -0.1, -0.69, -0.70, -1.0, -8.0, -30.0, -50.0, -80.0]


def test_odds_by_hand() -> None:
    """p_w = 1/2, p_l = 1/3: odds 1 and 1/2, ratio 2, loss log(1 + 1/2) = 0.405465."""
    w, l = (torch.tensor([math.log(p)], dtype=torch.float64) for p in (1 / 2, 1 / 3))
    assert float(log_odds_ratio(w, l)) == pytest.approx(math.log(2), abs=1e-12)
    assert float(orpo_loss(w, l)) == pytest.approx(math.log(1.5), abs=1e-12)


@pytest.mark.parametrize("x", ENDS)
def test_log_of_one_minus_p_keeps_its_digits_in_float32(x: float) -> None:
    value = torch.tensor(x, dtype=torch.float32).item()
    exact = math.log(-math.expm1(value)) if value > -0.69 else math.log1p(-math.exp(value))
    got = float(log1mexp(torch.tensor([x], dtype=torch.float32)))
    assert got == pytest.approx(exact, rel=2e-6, abs=1e-40)


@pytest.mark.parametrize("w", [*ENDS, 0.0])
@pytest.mark.parametrize("l", [-1e-7, -80.0])
def test_loss_and_gradient_are_finite_at_both_ends(w: float, l: float) -> None:
    tensors = [torch.tensor([v], dtype=torch.float32, requires_grad=True) for v in (w, l)]
    loss = orpo_loss(*tensors)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert all(bool(torch.isfinite(t.grad).all()) for t in tensors if t.grad is not None)


def test_equal_answers_cost_log_two_and_leave_the_likelihood() -> None:
    roles = roles_for(tiny_model(), Stack([]))
    rows = [{"row": 0, "prompt_ids": [5, 6], "chosen_ids": [7, 8, 2], "rejected_ids": [7, 8, 2]}]
    weighted = float(mean_loss(Orpo(odds_weight=0.7), roles, rows).detach())
    plain = float(mean_loss(Orpo(odds_weight=0.0), roles, rows).detach())
    assert weighted - plain == pytest.approx(0.7 * math.log(2), abs=1e-6)


@pytest.mark.parametrize("nll_on", ["all", "completion"])
@pytest.mark.parametrize("packing", [True, False])
def test_likelihood_is_a_mean_over_the_tokens_of_the_step(nll_on: Any, packing: bool) -> None:
    """Over prompt and chosen answer, or the chosen answer; micro-batches of one row give the mean of all three."""
    model = tiny_model()
    roles = roles_for(model, Stack([]), packing)
    total, count = 0.0, 0
    for row in PAIRS:
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        with torch.no_grad():
            t = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
        t = t if nll_on == "all" else t[-len(row["chosen_ids"]) :]
        total, count = total - float(t.sum()), count + t.numel()
    objective = Orpo(odds_weight=0.0, nll_on=nll_on)
    assert float(mean_loss(objective, roles, PAIRS).detach()) == pytest.approx(total / count, rel=1e-5)
    roles.micro_rows = 1
    assert len(next(iter(objective.batches(iter([PAIRS]), roles)))) == 3
    assert float(mean_loss(objective, roles, PAIRS).detach()) == pytest.approx(total / count, rel=1e-5)


def test_no_reference_is_asked_for() -> None:
    assert Orpo().reference_of() == "none"
    roles = roles_for(tiny_model(), Stack([]))
    roles.reference_tokens = None  # type: ignore[assignment,method-assign]
    assert math.isfinite(float(mean_loss(Orpo(), roles, PAIRS).detach()))


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_loss_and_gradients_equal_the_reference_trainer(weight: float, tmp_path: Path) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model, roles = ours()
    theirs = ORPOTrainer(
        tiny_model(), args=ORPOConfig(**arguments(tmp_path, 3, beta=weight)), train_dataset=pair_dataset(),
        processing_class=word_tokenizer(), peft_config=lora_config(),
    )  # fmt: skip
    pairs = share_weights(theirs.model, model)
    wanted, _ = theirs.get_batch_loss_metrics(
        theirs.model, {**answer_tensors(PAIRS, "chosen"), **answer_tensors(PAIRS, "rejected")}
    )
    assert_same(mean_loss(Orpo(odds_weight=weight), roles, PAIRS), wanted, pairs)
