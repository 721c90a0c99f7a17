"""The survey's denoising loss on embeddings: squared errors by hand, targets without a gradient, noise of rows, the alarm."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmrecipe.core.errors import RecipeError
from llmrecipe.models import stored_heads, task_heads
from llmrecipe.objectives.pretraining._engines import embedding_target
from llmrecipe.objectives.pretraining.dae import HEAD, Dae
from llmrecipe.training.dry_run import check
from tests.objectives.test_dae import ROWS, roles_of, row
from tests.tiny import tiny_masked_model
from tests.trainings import QUIET, learned, resumes_to_the_bit


def setting(**options: Any) -> tuple[Any, Dae]:
    model: Any = tiny_masked_model().double()
    objective = Dae(form="mse", **options)
    objective.prepare_model(model, 0)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)  # training has moved them since
    return model, objective


def expected(model: Any, objective: Dae, table: Tensor, noise: Any = None) -> tuple[Tensor, int]:
    """The summed squared error of each row by itself, and the number of positions."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for one in ROWS:
        noised = objective.noised_row(one, roles_of(model), "masked")
        embedded = model.get_input_embeddings()(torch.tensor([noised.source]))
        states = model.base_model(inputs_embeds=embedded if noise is None else embedded + noise(one)).last_hidden_state[0]
        for place, copied in enumerate(noised.copied):
            if copied is False or (copied and objective.loss_on == "all"):
                total = total + (states[place] - table[noised.target[place]]).square().sum()
                count += 1
    return total, count


@pytest.mark.parametrize("target", ["frozen", "ema", "layernorm"])
@pytest.mark.parametrize("loss_on", ["all", "corrupted"])
def test_loss_and_gradients_are_the_squared_errors(target: str, loss_on: str) -> None:
    model, objective = setting(target=target, loss_on=loss_on, mask_tokens=0.4)
    weight = model.get_input_embeddings().weight.detach()
    table = torch.nn.functional.layer_norm(weight, weight.shape[-1:]) if target == "layernorm" else weight / 1.5
    wanted, count = expected(model, objective, table)
    wanted.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert float(gradients["model.encoder.embed_tokens.weight"].abs().max()) > 1e-3
    for packing in (False, True):
        model.zero_grad()
        roles = roles_of(model, packing)
        batch = objective.collate(ROWS, roles)
        loss = objective.loss(batch, roles)
        assert objective.weight(batch) == count
        # The table is stored in float32 at least; float64 here.
        torch.testing.assert_close(loss.total, wanted, rtol=1e-7, atol=1e-7)
        loss.total.backward()
        for name, gradient in gradients.items():
            found = model.get_parameter(name).grad
            torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_noise_on_embeddings_follows_the_row() -> None:
    model, objective = setting(mask_tokens=0.0, sigma=0.3)
    batch = objective.collate(ROWS, roles_of(model, True))
    alone = {one["row"]: objective.collate([one], roles_of(model)).extra["embedding_noise"][0] for one in ROWS}
    assert float(torch.cat(list(alone.values())).std()) == pytest.approx(0.3, abs=0.03)
    wanted, _ = expected(model, objective, embedding_target.target_table(model, "frozen"), lambda one: alone[one["row"]])
    for packing in (False, True):
        roles = roles_of(model, packing)
        torch.testing.assert_close(objective.loss(objective.collate(ROWS, roles), roles).total, wanted, rtol=1e-6, atol=1e-6)
    later = objective.collate([row(0, 19, 1)], roles_of(model)).extra["embedding_noise"]
    assert not torch.equal(later[0], batch.extra["embedding_noise"][0, :19])


def test_metrics_are_nearest_tokens_and_the_copy() -> None:
    model, objective = setting(mask_tokens=0.5)
    roles = roles_of(model)
    batch = objective.collate(ROWS, roles)
    found = objective.loss(batch, roles).metrics
    table = embedding_target.target_table(model, "frozen")
    states = roles.engine(batch, want="states")["states"].flatten(0, 1)[batch.source]
    near = torch.cdist(states, table).argmin(-1)
    assert found["accuracy"] == (float((near == batch.target).sum()), 30)
    shown = batch.input_ids.flatten()[batch.source]
    assert float(found["loss/copy"][0]) == pytest.approx(float((table[shown] - table[batch.target]).square().sum()))
    assert found["target_variance"][0] / 30 == pytest.approx(float(table.var(0, unbiased=False).mean()))


def test_moving_targets_follow_and_a_collapse_is_said_once() -> None:
    model, objective = setting(target="ema")
    said: list[str] = []
    roles: Any = SimpleNamespace(model=model, events=SimpleNamespace(warning=said.append))
    before = model.task_head[embedding_target.HEAD].table.clone()
    objective.after_step(1, {"target_variance": 4.0}, roles)
    table = model.task_head[embedding_target.HEAD].table
    torch.testing.assert_close(table, 0.999 * before + 0.001 * 1.5 * before)
    again = Dae(form="mse", target="ema")
    again.load_state(objective.state())
    for spread in (0.05, 0.03, 0.02):
        again.after_step(2, {"target_variance": spread}, roles)
    assert len(said) == 1 and "collapsed at step 2" in said[0]


def test_the_alarm_sees_the_collapse_of_targets_with_a_gradient() -> None:
    """Shrinking embeddings lower the loss with live targets; their variance falls, that of stored ones stays."""
    model, objective = setting()
    roles = roles_of(model)
    batch = objective.collate(ROWS, roles)
    weight = model.get_input_embeddings().weight
    states = roles.engine(batch, want="states")["states"].flatten(0, 1)[batch.source]
    live = (states - weight[batch.target]).square().sum()
    (slope,) = torch.autograd.grad(live, weight)
    (stopped,) = torch.autograd.grad(objective.loss(batch, roles).total, weight)
    before = embedding_target.variance(weight.detach())
    assert embedding_target.variance((weight - 1e-3 * slope).detach()) < before
    assert not torch.allclose(slope, stopped)
    assert embedding_target.variance(embedding_target.target_table(model, "frozen")) == pytest.approx(before / 1.5**2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective.form=mse"], r"objective\.form: mse: .*needs an encoder"),
        (["objective.form=mse", "model.config.kind=encoder", "objective.delete=0.1"], r"objective\.delete: moves tokens"),
        (["objective.form=tsdae"], r"objective\.form: tsdae: its decoder is the encoder itself"),
        (
            ["objective.form=tsdae", "model.config.kind=encoder", "objective.loss_on=corrupted"],
            r"objective\.loss_on: corrupted",
        ),
    ],
)
def test_what_the_forms_of_an_encoder_refuse(words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check("dae", [*QUIET, *words])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["mse", "tsdae"])
def test_a_resumed_run_is_the_whole_one_to_the_bit(form: str, tmp_path: Any) -> None:
    words = [*QUIET, "steps=4", "model.config.kind=encoder", f"objective.form={form}", "batch.size=8", "eval.at_start=false"]
    words += ["objective.target=ema"] if form == "mse" else []
    resumes_to_the_bit(tmp_path, "dae", words, 2)
    runs = tmp_path / "whole", tmp_path / "parts"
    whole, part = ({**learned(run), **load_file(run / "final" / stored_heads.FILE)} for run in runs)
    kept = f"{embedding_target.HEAD}.table" if form == "mse" else f"{HEAD}.value.0.weight"
    assert f"{task_heads.ATTRIBUTE}.{kept}" in whole
    assert whole.keys() == part.keys() and all(torch.equal(whole[name], part[name]) for name in whole)
