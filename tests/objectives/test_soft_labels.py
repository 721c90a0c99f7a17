"""Soft labels of pairs: DPO by hand in float64, its limits, and everywhere else a refusal before training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.core.errors import DataError
from llmrecipe.data import prepare
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.objectives.alignment.dpo import Dpo, dpo_loss
from llmrecipe.objectives.alignment.ipo import Ipo
from llmrecipe.objectives.alignment.orpo import Orpo
from llmrecipe.objectives.alignment.simpo import Simpo
from llmrecipe.recipe.compose import compose
from llmrecipe.recipe.data_section import DataSection
from llmrecipe.training.dry_run import examine
from tests.data.toys import byte_tokenizer
from tests.methods.reparameterized.test_lora import fill
from tests.objectives.parity import PAIRS
from tests.tiny import roles_for, tiny_model

SOFT = [{**row, "p": p} for row, p in zip(PAIRS, (0.9, 0.25, 1.0), strict=True)]


def moved() -> Any:
    """A LoRA policy away from its reference."""
    model, stack = tiny_model(), Stack([Lora(name="lora")])
    stack.attach(model)
    fill(model)
    return roles_for(model, stack)


def test_the_loss_of_a_pair_by_hand() -> None:
    """h = 0.4, p = 0.7: -0.7 log sigma(0.4) - 0.3 log sigma(-0.4); a flip of e = 0.1 makes q = 0.9 * 0.7 + 0.1 * 0.3 = 0.66."""
    right, wrong = math.log(1 / (1 + math.exp(-0.4))), math.log(1 / (1 + math.exp(0.4)))
    h, p = torch.tensor([0.4, 0.4], dtype=torch.float64), torch.tensor([0.7, 0.0], dtype=torch.float64)
    torch.testing.assert_close(dpo_loss(h, p=p), torch.tensor([-0.7 * right - 0.3 * wrong, -wrong], dtype=torch.float64))
    wanted = torch.tensor([-0.66 * right - 0.34 * wrong, -0.1 * right - 0.9 * wrong], dtype=torch.float64)
    torch.testing.assert_close(dpo_loss(h, smoothing=0.1, p=p), wanted)


def test_its_slope_vanishes_where_the_policy_says_what_the_label_says() -> None:
    """d/dh = sigma(h) - p: a label of 0.8 stops pulling at h = log 4, where a certain one never stops."""
    h = torch.tensor([math.log(4.0), 0.0], dtype=torch.float64, requires_grad=True)
    dpo_loss(h, p=torch.tensor([0.8, 0.8], dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(h.grad, torch.tensor([0.0, -0.3], dtype=torch.float64))


def test_certain_labels_are_plain_dpo_and_constant_ones_label_smoothing() -> None:
    h = torch.linspace(-5, 5, 11, dtype=torch.float64)
    assert torch.equal(dpo_loss(h, p=torch.ones(11, dtype=torch.float64)), dpo_loss(h))
    torch.testing.assert_close(dpo_loss(h, p=0.9), dpo_loss(h, smoothing=0.1), atol=1e-14, rtol=0)


def test_rows_bring_their_own_labels() -> None:
    """The summed loss of a batch from its log-ratios and the rows' labels; rows that are certain change nothing."""
    objective = Dpo(beta=0.5)
    roles = moved()
    with torch.no_grad():
        batch = objective.collate(SOFT, roles)
        plain = objective.loss(objective.collate(PAIRS, roles), roles)
        got = objective.loss(batch, roles)
        policy = batch.sum_by_sequence(roles.policy(batch)["logprobs"]).view(-1, 3).double()
        reference = roles.reference(batch).view(-1, 3).double()
    r = policy - reference
    wanted = 0.0
    for h, row in zip((0.5 * (r[:, 1] - r[:, 2])).tolist(), SOFT, strict=True):
        wanted += row["p"] * math.log1p(math.exp(-h)) + (1 - row["p"]) * math.log1p(math.exp(h))
    assert float(got.total) == pytest.approx(wanted, rel=1e-5)
    assert abs(float(got.total) - float(plain.total)) > 1e-3
    assert "p" not in objective.collate([{**row, "p": 1.0} for row in PAIRS], roles).extra
    assert objective.step_zero()["loss"] == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    "objective", [Ipo(), Orpo(), Simpo(), Dpo(loss_type="hinge"), Dpo(loss_type="nca"), Dpo(loss_type="logprob_gap")]
)
def test_losses_without_a_place_for_them_refuse(objective: Any) -> None:
    roles = roles_for(tiny_model(), Stack([]))
    with pytest.raises(DataError, match=r"row 1: p is 0.25: .* does not support the probability"):
        objective.collate(SOFT[1:], roles)
    objective.collate([{**row, "p": 1.0} for row in PAIRS], roles)


def rows_file(folder: Path, *labels: float | None) -> Path:
    path = folder / "pairs.jsonl"
    rows = [{"prompt": "q", "chosen": "yes", "rejected": "no", **({} if p is None else {"p": p})} for p in labels]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_they_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    path = rows_file(tmp_path, 1.0, None, 0.75, 0.5)
    words = [f"data.path={path}", "data.cache=false", "batch.size=2", "steps=1"]
    with pytest.raises(DataError, match=r"row 2: p is 0.75: ipo does not support .* use objective=dpo with loss_type=sigmoid"):
        examine(compose("ipo_lora", words))
    with pytest.raises(DataError, match=r"row 2: p is 0.75: objective\.loss_type=robust"):
        examine(compose("dpo_lora", [*words, "objective.loss_type=robust", "objective.label_smoothing=0.1"]))
    examine(compose("dpo_lora", words))


def test_answers_by_themselves_have_no_soft_label(tmp_path: Path) -> None:
    hard = DataSection(path=str(rows_file(tmp_path, 1.0, None)), cache=False)
    data = prepare(hard, byte_tokenizer(), "unpaired", seed=0)
    assert data is not None and len(data) == 4
    soft = DataSection(path=str(rows_file(tmp_path, 0.75)), cache=False)
    with pytest.raises(DataError, match=r"'p' is 0.75: .*use pairs \(dpo, reward\)"):
        prepare(soft, byte_tokenizer(), "unpaired", seed=0)
