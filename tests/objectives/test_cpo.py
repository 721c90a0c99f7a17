"""CPO by hand, its two terms, and parity with the reference trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.methods._base.stack import Stack
from llmrecipe.objectives.alignment.cpo import Cpo, cpo_loss
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
from tests.recipes.learning import PAIRS as PAIRS_SWAPPED
from tests.tiny import roles_for, tiny_model
from tests.trainings import events, train_recipe


def test_losses_by_hand() -> None:
    """beta u = log 3: sigma = 3/4; hinge max(0, 1 - log 3) = 0; at u = 0 hinge 1 and ipo (1 / 2 beta)^2."""
    chosen, rejected = torch.tensor([math.log(9.0)], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert float(cpo_loss(chosen, rejected, 0.5)) == pytest.approx(math.log(4 / 3), abs=1e-12)
    smoothed = 0.9 * math.log(4 / 3) + 0.1 * math.log(4)
    assert float(cpo_loss(chosen, rejected, 0.5, smoothing=0.1)) == pytest.approx(smoothed, abs=1e-12)
    assert float(cpo_loss(chosen, rejected, 0.5, "hinge")) == 0.0
    assert float(cpo_loss(rejected, rejected, 0.5, "hinge")) == 1.0
    assert float(cpo_loss(rejected, rejected, 0.25, "ipo")) == pytest.approx(4.0)


@pytest.mark.parametrize("packing", [True, False])
def test_terms_from_whole_logits_in_float64(packing: bool) -> None:
    """Preference over summed log-probabilities, NLL as a mean over all tokens of the chosen answers of the step."""
    model = tiny_model()
    roles = roles_for(model, Stack([]), packing)
    sums: dict[str, list[float]] = {"chosen_ids": [], "rejected_ids": []}
    for row in PAIRS:
        for side, found in sums.items():
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            with torch.no_grad():
                t = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
            found.append(float(t[-len(row[side]) :].sum()))
    margins = [c - r for c, r in zip(sums["chosen_ids"], sums["rejected_ids"], strict=True)]
    preference = sum(math.log1p(math.exp(-0.3 * m)) for m in margins) / 3
    nll = -sum(sums["chosen_ids"]) / sum(len(row["chosen_ids"]) for row in PAIRS)
    for micro in (None, 1):
        roles.micro_rows = micro
        got = float(mean_loss(Cpo(beta=0.3, bc_weight=0.7), roles, PAIRS).detach())
        assert got == pytest.approx(preference + 0.7 * nll, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
@pytest.mark.parametrize("bc_weight", [0.0, 1.0])
def test_loss_and_gradients_equal_the_reference_trainer(loss_type: Any, bc_weight: float, tmp_path: Path) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    model, roles = ours()
    smoothing = 0.1 if loss_type == "sigmoid" else 0.0
    args = arguments(tmp_path, 3, beta=0.2, cpo_alpha=bc_weight, loss_type=loss_type, label_smoothing=smoothing)
    theirs = CPOTrainer(
        tiny_model(), args=CPOConfig(**args), train_dataset=pair_dataset(),
        processing_class=word_tokenizer(), peft_config=lora_config(),
    )  # fmt: skip
    pairs = share_weights(theirs.model, model)
    wanted, _ = theirs.get_batch_loss_metrics(
        theirs.model, {**answer_tensors(PAIRS, "chosen"), **answer_tensors(PAIRS, "rejected")}
    )
    objective = Cpo(beta=0.2, bc_weight=bc_weight, loss_type=loss_type, label_smoothing=smoothing)
    assert_same(mean_loss(objective, roles, PAIRS), wanted, pairs)


@pytest.mark.slow
def test_the_recipe_orders_held_out_pairs_and_its_control_does_not(tmp_path: Path) -> None:
    """The control trains on pairs whose sides are swapped at random."""
    metric = "eval/rewards/accuracies"
    train_recipe(tmp_path / "run", "cpo_lora")
    assert events(tmp_path / "run", "evaluation")[-1][metric] >= 0.95
    train_recipe(tmp_path / "control", "cpo_lora", *PAIRS_SWAPPED(tmp_path / "data"))
    assert events(tmp_path / "control", "evaluation")[-1][metric] <= 0.75
