"""Methods on one model fold into its weights in the order of the forward pass, whatever their order in the stack."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmrecipe.core import registry
from llmrecipe.engine.forward import Engine
from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.objectives.finetuning.sft import Sft
from llmrecipe.recipe.schema import ModelSection
from llmrecipe.runs.open_model import LoadedModel, merge_mounted, merge_order
from tests.contract import OPTIONS, Subject, outputs, probe_of, run_steps
from tests.tiny import Tokenizer, tiny_model

KINDS = ["lora", "ia3", "dora", "fishmask", "bitfit", "spt"]
EVERYWHERE = {"lora": {"target": "all-linear"}, "dora": {"target": "all-linear"}}


def trained(*kinds: str) -> Subject:
    torch.manual_seed(0)
    model = tiny_model()
    wrappers = [
        registry.load_class("stack", k)(name=f"{n}_{k}", **OPTIONS.get(k, {}), **EVERYWHERE.get(k, {}))
        for n, k in enumerate(kinds)
    ]
    stack = Stack(wrappers)
    stack.attach(model)
    subject = Subject(model, stack, Roles(Engine(model), stack, Tokenizer(), torch.device("cpu"), True), Sft())
    stack.calibrate(model, probe_of(subject))
    subject.roles.engine.eval()
    run_steps(subject, 2)
    with torch.no_grad():
        for name, parameter in subject.trained().items():
            # Two steps move little; wrong orders must show.
            parameter.add_(torch.randn_like(parameter) * (0.0 if "magnitude" in name else 0.05))
        stack.after_step(model, 2)
    return subject


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(KINDS, 2)))
def test_two_methods_fold_exactly(first: str, second: str) -> None:
    subject = trained(first, second)
    wanted = outputs(subject)
    loaded = LoadedModel(subject.model, None, ModelSection(path="tiny"), mounted=list(subject.stack))
    merge_mounted(loaded)
    assert not list(all_hooks(subject.model))
    torch.testing.assert_close(outputs(subject), wanted, atol=2e-4, rtol=1e-3)


def test_what_scales_the_sum_comes_after_what_adds_to_it() -> None:
    subject = trained("ia3", "lora", "dora")
    loaded = LoadedModel(subject.model, None, ModelSection(path="tiny"), mounted=list(subject.stack))
    assert [w.name for w in merge_order(loaded)] == ["2_dora", "1_lora", "0_ia3"]


@pytest.mark.parametrize("other", ["ia3", "dora", "bitfit"])
@pytest.mark.parametrize("last", [False, True])
def test_the_bias_of_a_branch_folds_exactly_beside_another_method(
    other: str, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EVERYWHERE, "lora", {"target": "attn.q|v + mlp.up", "lora_bias": True})
    monkeypatch.setitem(EVERYWHERE, "dora", {"target": "attn.q|v + mlp.up"})
    test_two_methods_fold_exactly(*((other, "lora") if last else ("lora", other)))
