"""Activations are recomputed in eval mode, in which objectives without dropout train: fewer are kept, numbers stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.data.collate import Sequence, pad
from llmrecipe.engine.forward import Engine
from llmrecipe.models.load import prepare_for_training
from llmrecipe.objectives.alignment.dpo import Dpo
from llmrecipe.recipe.schema import ModelSection
from llmrecipe.training.dry_run import check
from llmrecipe.training.kept_tensors import KeptTensors
from tests.tiny import tiny_model

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
