"""The load-balancing loss: its formula by hand, padding, and its way into the objective for any family."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.data.collate import Sequence, pack, pad
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.load_balance import auxiliary_loss, load_balancing_loss
from llmrecipe.objectives.pretraining.clm import Clm
from tests.models.configs import tiny
from tests.models.test_native import native
from tests.trainings import events, train_recipe

LOG = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.3, 0.5, 0.2]]))


def test_the_formula_by_hand() -> None:
    """k = 1: experts 0, 0, 2, 1: c = (2, 1, 1) / 4; m = (1.7, 1.1, 1.2) / 4; L = 3 (3.4 + 1.1 + 1.2) / 16 = 1.06875."""
    assert load_balancing_loss([LOG], 1).item() == pytest.approx(1.06875, abs=1e-6)


def test_two_experts_a_token_and_layers_together() -> None:
    """k = 2 over both layers, the second even: c = (6, 8, 2) / 8 with ties to the first two; m = (1.7 + 4/3, ...) / 8."""
    even = torch.zeros(4, 3)
    chosen = torch.cat([LOG.topk(2).indices, even.topk(2).indices]).flatten().bincount(minlength=3) / 8
    mean = torch.cat([LOG.softmax(-1), even.softmax(-1)]).mean(0)
    assert load_balancing_loss([LOG, even], 2).item() == pytest.approx(3 * float(chosen @ mean), abs=1e-6)
    assert load_balancing_loss([even], 3).item() == pytest.approx(3.0, abs=1e-6)


def test_padding_does_not_count_and_virtual_tokens_in_front_do() -> None:
    padded = torch.cat([LOG, torch.tensor([[9.0, 0.0, 0.0], [9.0, 0.0, 0.0]])])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    assert load_balancing_loss([padded], 1, mask).item() == pytest.approx(1.06875, abs=1e-6)
    assert load_balancing_loss([padded], 1, torch.tensor([[1, 1, 1, 0, 0]])).item() == pytest.approx(1.06875, abs=1e-6)
    assert load_balancing_loss([LOG], 1, torch.tensor([[0, 0, 1, 1, 1, 1]])).item() == pytest.approx(1.06875, abs=1e-6)


def test_a_family_that_records_nothing_is_told_so() -> None:
    config = native("mixture").config
    with pytest.raises(ModelError, match=r"model.config.output_router_logits: llmrecipe_native gives no router logits"):
        auxiliary_loss(config, SimpleNamespace(router_logits=()))
    assert auxiliary_loss(native("llama").config, SimpleNamespace()) is None


def roles_of(model: nn.Module) -> Roles:
    engine = Engine(model)  # type: ignore[arg-type]
    return Roles(engine, Stack([]), SimpleNamespace(pad_token_id=0), torch.device("cpu"), packing=False)


ROWS = [Sequence([1, 5, 9, 7, 3], [0, 1, 1, 1, 1]), Sequence([1, 8, 6], [0, 1, 1])]


def mixtral(**changes: Any) -> nn.Module:
    return tiny("mixtral", **changes)


@pytest.mark.parametrize("family", ["native", "mixtral", "olmoe"])
def test_the_objective_gets_it_from_any_family(family: str) -> None:
    """training_loss = what Transformers' own forward returns for the same rows, whatever reads the model: padded or packed."""
    wanted = {"output_router_logits": True, "router_aux_loss_coef": 0.25}
    model = native("mixture", **wanted) if family == "native" else tiny(family, **wanted)
    batch = pad(ROWS, 0)
    loss = Clm().training_loss(batch, roles_of(model))
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    reference = model(batch.input_ids, attention_mask=batch.attention_mask, labels=labels)
    assert float(loss.total + loss.auxiliary) / 6 == pytest.approx(reference.loss.item(), rel=1e-5)
    assert float(loss.auxiliary) / 6 == pytest.approx(0.25 * reference.aux_loss.item(), rel=1e-5)
    value, count = loss.metrics["auxiliary_loss"]
    assert (float(value), count) == (pytest.approx(float(loss.auxiliary)), 6)
    (loss.total + loss.auxiliary).backward()
    reference.loss.mul(6).backward()  # gradients add up: twice those of one pass
    total = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model(batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.mul(12).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(total[name], parameter.grad, atol=1e-5 * float(parameter.grad.abs().max() + 1)), name
    assert Clm().evaluate(batch, roles_of(model)).keys() == {"loss", "nll", "accuracy"}


def test_families_that_ask_for_none_have_none() -> None:
    loss = Clm().training_loss(pad(ROWS, 0), roles_of(mixtral()))
    assert loss.auxiliary == 0.0 and "auxiliary_loss" not in loss.metrics


def test_both_sides_of_an_encoder_decoder_are_balanced() -> None:
    model = native("mixture", "encoder_decoder", router_aux_loss_coef=0.25)
    source, mask = torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = dataclasses.replace(pad(ROWS, 0), extra={"encoder_ids": source, "encoder_mask": mask})
    loss = Clm().training_loss(batch, roles_of(model))
    out = model.model(
        source, attention_mask=mask, decoder_input_ids=batch.input_ids, decoder_attention_mask=batch.attention_mask
    )
    sides: list[tuple[Any, Tensor]] = [(out.encoder_router_logits, mask), (out.decoder_router_logits, batch.attention_mask)]
    wanted = 0.25 * sum(load_balancing_loss(logits, 2, own) for logits, own in sides)
    assert float(loss.auxiliary) / 6 == pytest.approx(float(wanted), rel=1e-6)


def test_checkpointed_blocks_give_the_same_gradient() -> None:
    def gradient(checkpointed: bool) -> Tensor:
        model = native("mixture", router_aux_loss_coef=1.0).train()
        if checkpointed:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        loss = Clm().training_loss(pack(ROWS), roles_of(model))
        loss.auxiliary.backward()  # type: ignore[union-attr]
        return model.model.decoder.layers[0].mlp.router.weight.grad

    assert gradient(False).abs().max() > 0
    assert torch.allclose(gradient(False), gradient(True), atol=1e-6)


def test_a_run_reports_it_beside_the_loss_and_evens_out_the_experts(tmp_path: Path) -> None:
    """With a large weight the balance approaches its least value k; the reported loss stays that of the tokens."""
    model = ["num_hidden_layers=2", "hidden_size=32", "router_aux_loss_coef=10", "initializer_range=0.3"]
    words = [f"model.config.{word}" for word in model] + ["optim.lr=1e-2", "steps=12", "eval.at_start=false"]
    words += ["data.limit=64", "data.max_length=32"]
    train_recipe(tmp_path / "run", "clm", "model=native_moe", *words)
    steps = events(tmp_path / "run")
    balance = [step["auxiliary_loss"] / 10 for step in steps]
    assert max(balance) > 2.2 and sum(balance[-4:]) / 4 < 2.06
    assert steps[0]["loss"] == pytest.approx(steps[0]["nll"], rel=1e-5)
