"""SimPO by hand and parity with the reference trainer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from llmrecipe.methods._base.stack import Stack
from llmrecipe.objectives.alignment.simpo import Simpo, simpo_loss
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


def test_margin_by_hand() -> None:
    """beta 2, w - l = 0.4, gamma 0.5: u = 0.3, loss log(1 + e^-0.3)."""
    w, l = torch.tensor([[-0.6], [-1.0]], dtype=torch.float64)
    assert float(simpo_loss(w, l, 2.0, 0.5)) == pytest.approx(math.log1p(math.exp(-0.3)), abs=1e-12)
    smooth = 0.8 * math.log1p(math.exp(-0.3)) + 0.2 * math.log1p(math.exp(0.3))
    assert float(simpo_loss(w, l, 2.0, 0.5, 0.2)) == pytest.approx(smooth, abs=1e-12)


def test_equal_answers_leave_the_target_margin() -> None:
    roles = roles_for(tiny_model(), Stack([]))
    rows = [{"row": 0, "prompt_ids": [5, 6], "chosen_ids": [7, 8, 2], "rejected_ids": [7, 8, 2]}]
    loss = float(mean_loss(Simpo(gamma=1.2), roles, rows).detach())
    assert loss == pytest.approx(math.log1p(math.exp(1.2)), abs=1e-6)


def test_a_longer_answer_is_not_preferred_for_its_length() -> None:
    """Rewards are means: the same tokens twice as likely to be counted do not change the reward."""
    model = tiny_model()
    roles = roles_for(model, Stack([]))
    batch = Simpo().collate(PAIRS, roles)
    loss = Simpo(beta=1.0).loss(batch, roles)
    wanted = 0.0
    for row in PAIRS:
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        with torch.no_grad():
            t = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
        wanted += float(t[-len(row["chosen_ids"]) :].mean())
    assert float(loss.metrics["rewards/chosen"][0]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_loss_and_gradients_equal_the_reference_trainer(tmp_path: Path) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    model, roles = ours()
    config = CPOConfig(**arguments(tmp_path, 3, beta=2.0, loss_type="simpo", simpo_gamma=0.9, cpo_alpha=0.0))
    theirs = CPOTrainer(
        tiny_model(), args=config, train_dataset=pair_dataset(), processing_class=word_tokenizer(), peft_config=lora_config()
    )
    pairs = share_weights(theirs.model, model)
    wanted, _ = theirs.get_batch_loss_metrics(
        theirs.model, {**answer_tensors(PAIRS, "chosen"), **answer_tensors(PAIRS, "rejected")}
    )
    assert_same(mean_loss(Simpo(beta=2.0, gamma=0.9), roles, PAIRS), wanted, pairs)
