"""Activations are recomputed in eval mode, in which objectives without dropout train: fewer are kept, numbers stay."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.data.collate import Sequence, pad
from llmrecipe.engine.forward import Engine
from llmrecipe.models.load import prepare_for_training
from llmrecipe.objectives.alignment.dpo import Dpo
from llmrecipe.objectives.alignment.grpo import Grpo
from llmrecipe.objectives.alignment.ppo import Ppo
from llmrecipe.recipe.schema import ModelSection
from llmrecipe.training.dry_run import check
from llmrecipe.training.kept_tensors import KeptTensors
from tests.contract import PAIRS
from tests.objectives import test_grpo as grpo
from tests.objectives import test_ppo as ppo
from tests.objectives.rollouts import REWARD, gradients, mean_loss, setting
from tests.tiny import tiny_model
from tests.trainings import curve, learned, train_recipe

FUNCTIONAL = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.5, "num_key_value_heads": None}
"""OPT, whose blocks call dropout as a function of their own mode."""


def passed(family: str, more: dict[str, Any], recomputes: bool) -> tuple[nn.Module, int, dict[str, Tensor]]:
    """A model after a pass in eval mode, the bytes kept for the backward pass, and the gradients."""
    model: Any = tiny_model(family, **more)
    prepare_for_training(model, ModelSection(gradient_checkpointing=recomputes))
    engine = Engine(model).eval()
    batch = pad([Sequence([1, 5, 9, 20, 33], [0, 0, 1, 1, 1]), Sequence([1, 7, 8], [0, 1, 1])], 0)
    with KeptTensors(list(model.parameters()), vocabulary=64) as kept:
        loss = engine(batch)["logprobs"].square().sum()
        now = kept.now
    assert not any(module.training for module in model.modules())
    loss.backward()
    assert not any(module.training for module in model.modules())
    return model, now, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "more"), [("llama", {}), ("opt", FUNCTIONAL)])
def test_blocks_in_eval_mode_recompute_what_they_computed(family: str, more: dict[str, Any]) -> None:
    _, whole, wanted = passed(family, more, False)
    model, kept, found = passed(family, more, True)
    assert kept < 0.6 * whole
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    functions = {id(m._gradient_checkpointing_func) for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")}
    assert len(functions) == 1, "the family's own function is back at every block"


def test_a_pass_without_gradients_is_left_alone() -> None:
    model: Any = tiny_model()
    prepare_for_training(model, ModelSection(gradient_checkpointing=True))
    modes: list[bool] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    batch = pad([Sequence([1, 5, 9], [0, 1, 1])], 0)
    with torch.no_grad():
        Engine(model).eval()(batch)
    assert modes[-1] is False


def test_check_knows_that_an_objective_without_dropout_recomputes() -> None:
    assert not Dpo.dropout
    words = ["log.live=off", "data.limit=8", "batch.size=4"]
    kept, whole = (
        check("dpo_lora", [*words, f"model.gradient_checkpointing={on}"]).memory.predicted()["activations"]
        for on in ("true", "false")
    )
    assert kept < 0.6 * whole


def test_blocks_are_looked_for_once_and_switches_are_read_at_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk over the modules at each pass would be slow; recomputation can still be turned on and off between passes."""
    model: Any = tiny_model()
    engine = Engine(model).eval()
    batch = pad([Sequence([1, 5, 9, 20, 33], [0, 0, 1, 1, 1])], 0)
    walks: list[int] = []
    walk = model.modules

    def counted() -> Iterator[nn.Module]:
        walks.append(1)
        return walk()

    def kept() -> int:
        with KeptTensors(list(model.parameters()), vocabulary=64) as found:
            loss = engine(batch)["logprobs"].sum()
            now = found.now
        loss.backward()
        return now

    whole = kept()
    monkeypatch.setattr(model, "modules", counted)
    assert kept() == whole and not walks
    prepare_for_training(model, ModelSection(gradient_checkpointing=True))
    walks.clear()
    assert kept() < 0.6 * whole and not walks
    model.gradient_checkpointing_disable()
    assert kept() == whole
    engine.eval()
    walks.clear()
    assert kept() == whole and len(walks) == 1, "a change of mode looks again"


# --- objectives without dropout ---------------------------------------------------------------------------------------


def pairs() -> tuple[Any, Any, Any]:
    objective: Any = Dpo(beta=0.3)
    roles = setting(objective)
    roles.stack.snapshot_reference(roles.model)
    return objective, roles, objective.collate(PAIRS, roles)


def groups() -> tuple[Any, Any, Any]:
    objective = Grpo(reward=REWARD, answers=2, max_new_tokens=8, beta=0.2)
    roles, batch = grpo.known(objective)
    return objective, roles, grpo.moved(batch)


def valued(value: Any) -> Callable[[], tuple[Any, Any, Any]]:
    def made() -> tuple[Any, Any, Any]:
        objective = Ppo(**ppo.options(value=value))
        return objective, *ppo.known(objective)

    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "made", [pairs, groups, valued("adapter"), valued("shared")], ids=["dpo", "grpo", "ppo", "ppo of one trunk"]
)
def test_an_objective_has_the_same_gradients_and_keeps_less(made: Callable[[], Any], dtype: torch.dtype) -> None:
    found = []
    for recomputes in (False, True):
        objective, roles, batch = made()
        assert not objective.dropout and not roles.engine.training
        for parameter in roles.model.parameters():
            parameter.data = parameter.data if parameter.requires_grad else parameter.data.to(dtype)
        prepare_for_training(roles.model, ModelSection(gradient_checkpointing=recomputes))
        with KeptTensors(list(roles.model.parameters()), vocabulary=64) as kept:
            loss = mean_loss(objective, batch, roles)
            now = kept.now
        loss.backward()
        found.append((now, loss.detach(), gradients(roles)))
    (whole, loss, wanted), (now, other, got) = found
    assert now < 0.7 * whole and torch.equal(loss, other)
    assert max(float(g.abs().max()) for g in wanted.values()) > 0.0
    assert got.keys() == wanted.keys() and [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dpo_lora", "grpo", "ppo"])
def test_a_low_precision_run_learns_the_same_to_the_bit_and_keeps_less(recipe: str, tmp_path: Path) -> None:
    words = ["model.dtype=bfloat16", "steps=2", "data.limit=16", "batch.size=4", "eval.at_start=false", "eval.load_best=false"]
    runs = {on: tmp_path / on for on in ("false", "true")}
    for on, folder in runs.items():
        train_recipe(folder, recipe, *words, f"model.gradient_checkpointing={on}", "eval.batches=1")
    whole, now = (json.loads((folder / "report.json").read_text(encoding="utf-8"))["memory"] for folder in runs.values())
    assert now["activations"] < 0.6 * whole["activations"]
    assert curve(runs["true"]) == curve(runs["false"])
    wanted, got = learned(runs["false"]), learned(runs["true"])
    assert wanted and got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []
