"""DPO's other losses and references: by hand, at step 0, and against the reference trainer."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmrecipe.core.errors import RecipeError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.objectives.alignment.dpo import Dpo, dpo_loss, separate_loss
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


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_exo_is_a_divergence_from_the_smoothed_label() -> None:
    """q = sigma(0.4): q log(q / 0.9) + (1 - q) log((1 - q) / 0.1), 0 where q = 0.9."""
    q = sigmoid(0.4)
    wanted = q * math.log(q / 0.9) + (1 - q) * math.log((1 - q) / 0.1)
    h = torch.tensor([0.4, math.log(9.0)], dtype=torch.float64)
    torch.testing.assert_close(dpo_loss(h, "exo", 0.1), torch.tensor([wanted, 0.0], dtype=torch.float64))


def test_losses_of_single_rewards_by_hand() -> None:
    """beta 0.5, r_w = 2, r_l = -1: a = 1, b = -0.5."""
    r_w, r_l = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    value = {k: float(separate_loss(r_w, r_l, 0.5, k)) for k in ("nca", "apo_zero", "apo_down", "sppo")}
    nca = -math.log(sigmoid(1)) - 0.5 * math.log(sigmoid(-1)) - 0.5 * math.log(sigmoid(0.5))
    assert value["nca"] == pytest.approx(nca)
    assert value["apo_zero"] == pytest.approx(1 - sigmoid(1) + sigmoid(-0.5))
    assert value["apo_down"] == pytest.approx(sigmoid(1) + 1 - sigmoid(1.5))
    assert value["sppo"] == pytest.approx((2 - 1) ** 2 + (-1 + 1) ** 2)


def test_logprob_gap_is_the_plain_difference_without_a_reference() -> None:
    objective = Dpo(loss_type="logprob_gap")
    assert objective.reference_of() == "none" and objective.step_zero() is not None
    roles = roles_for(tiny_model(), Stack([]))
    batch = objective.collate(PAIRS, roles)
    loss = objective.loss(batch, roles)
    gap = float(loss.metrics["logps/rejected"][0]) - float(loss.metrics["logps/chosen"][0])
    assert float(loss.total) == pytest.approx(gap, rel=1e-5)


def test_without_a_reference_the_rewards_are_the_log_probabilities() -> None:
    roles = roles_for(tiny_model(), Stack([]))
    roles.reference_tokens = None  # type: ignore[assignment,method-assign]
    objective = Dpo(reference="none", beta=0.5)
    loss = objective.loss(objective.collate(PAIRS, roles), roles)
    assert float(loss.metrics["rewards/chosen"][0]) == pytest.approx(0.5 * float(loss.metrics["logps/chosen"][0]), rel=1e-6)


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "hinge", "exo", "nca", "apo_zero", "apo_down", "sppo"])
def test_every_loss_starts_where_it_says(kind: Any) -> None:
    roles = roles_for(tiny_model(), Stack([]))
    objective = Dpo(loss_type=kind, label_smoothing=0.1 if kind in ("exo", "robust") else 0.0, beta=0.4)
    assert float(mean_loss(objective, roles, PAIRS).detach()) == pytest.approx(objective.step_zero()["loss"], abs=1e-5)


@pytest.mark.parametrize("micro", [None, 1])
def test_likelihood_term_is_a_mean_over_the_chosen_tokens_of_the_step(micro: int | None) -> None:
    model = tiny_model()
    roles = roles_for(model, Stack([]))
    roles.micro_rows = micro
    total, count = 0.0, 0
    for row in PAIRS:
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        with torch.no_grad():
            t = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
        total, count = total - float(t[-len(row["chosen_ids"]) :].sum()), count + len(row["chosen_ids"])
    with_term = float(mean_loss(Dpo(nll_coef=0.3), roles, PAIRS).detach())
    assert with_term == pytest.approx(math.log(2) + 0.3 * total / count, rel=1e-5)


@pytest.mark.parametrize(("kind", "value"), [("robust", 0.5), ("exo", 0.0)])
def test_smoothing_outside_its_range_is_refused(kind: Any, value: float) -> None:
    with pytest.raises(RecipeError, match=r"objective\.label_smoothing"):
        Dpo(loss_type=kind, label_smoothing=value).check(SimpleNamespace(), [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"loss_type": "exo", "label_smoothing": 0.01}, {"loss_type": ["exo_pair"], "label_smoothing": 0.01}),
        ({"loss_type": "nca"}, {"loss_type": ["nca_pair"]}),
        ({"loss_type": "apo_zero"}, {"loss_type": ["apo_zero"]}),
        ({"loss_type": "apo_down"}, {"loss_type": ["apo_down"]}),
        ({"loss_type": "sppo"}, {"loss_type": ["sppo_hard"]}),
        ({"nll_coef": 0.4}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.4]}),
    ],
)
def test_loss_and_gradients_equal_the_reference_trainer(options: dict, config: dict, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    model, roles = ours()
    theirs = DPOTrainer(
        tiny_model(), args=DPOConfig(**arguments(tmp_path, 3, beta=0.3, **config)), train_dataset=pair_dataset(),
        processing_class=word_tokenizer(), peft_config=lora_config(),
    )  # fmt: skip
    pairs = share_weights(theirs.model, model)
    batch = theirs.data_collator([theirs.train_dataset[i] for i in range(3)])
    assert_same(mean_loss(Dpo(beta=0.3, **options), roles, PAIRS), theirs.compute_loss(theirs.model, dict(batch)), pairs)
