"""A module that a method keeps once for the model belongs to it by its class, whatever the base calls its own modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from llmrecipe.methods.selective._engines.sparse_method import base_weights
from llmrecipe.models.hooks.hook import own_tensors
from llmrecipe.models.hooks.shared_module import SharedModule, add_shared, shared_modules
from llmrecipe.optim.optimizer import _kinds
from llmrecipe.runs.delta import fingerprint, rename_tensor
from tests.tiny import tiny_model


class Table(SharedModule):
    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.ones(2, 3))


def test_a_child_of_the_base_with_such_a_name_belongs_to_the_base() -> None:
    model = tiny_model()
    plain = fingerprint(model)
    model.add_module("lora_shared", nn.Linear(3, 3, bias=False))
    assert fingerprint(model) != plain
    assert "lora_shared.weight" in base_weights(model)
    assert own_tensors(model, "lora") == []
    assert "lora_shared.weight" not in _kinds(model)


def test_a_shared_module_belongs_to_its_wrapper() -> None:
    model = tiny_model()
    plain = fingerprint(model)
    add_shared(model, Table(), "lora")
    assert fingerprint(model) == plain
    assert "lora_shared.values" not in base_weights(model)
    assert own_tensors(model, "lora") == ["lora_shared.values"]
    assert own_tensors(model, "ia3") == []
    assert _kinds(model)["lora_shared.values"] == "adapter"
    assert [name for name, _ in shared_modules(copy.deepcopy(model))] == ["lora_shared"]


def test_a_taken_name_is_refused() -> None:
    model = tiny_model()
    add_shared(model, Table(), "lora")
    with pytest.raises(ValueError, match="already has a child called 'lora_shared'"):
        add_shared(model, Table(), "lora")


def test_saved_names_follow_the_name_of_the_wrapper() -> None:
    assert rename_tensor("adalora_shared.total", {"adalora": "first"}) == "first_shared.total"
    assert rename_tensor("other_shared.total", {"adalora": "first"}) == "other_shared.total"
