"""What a file of tensors may put into a model, and how large what it describes may be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmrecipe.core.errors import RunError
from llmrecipe.models.stored_tensors import SLACK, copy_saved, within_file
from llmrecipe.recipe.schema import ModelSection, TokenizerSection
from llmrecipe.runs.delta import Layer, mount_layer
from llmrecipe.runs.open_model import open_model


def model() -> Any:
    return open_model(ModelSection(path="tiny"), TokenizerSection()).model


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"weight": torch.zeros(2, 4)}, "lack bias"),
        ({"weight": torch.zeros(4), "bias": torch.zeros(2)}, r"weight has shape \(4,\), the model's has \(2, 4\)"),
        ({"weight": torch.zeros(1, 4), "bias": torch.zeros(2)}, r"weight has shape \(1, 4\)"),
        ({"weight": torch.zeros(2, 4, dtype=torch.int64), "bias": torch.zeros(2)}, "weight is of torch.int64"),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2), "x": torch.zeros(1)}, "hold x, which the model"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(saved: dict[str, torch.Tensor], said: str) -> None:
    """A tensor of one row would be repeated by PyTorch, and one that is missing would stay as it was."""
    with pytest.raises(ValueError, match=said):
        copy_saved(torch.nn.Linear(4, 2), saved, ["weight", "bias"])


def test_tensors_that_fit_are_put_to_the_bit() -> None:
    linear, wanted = torch.nn.Linear(4, 2), {"weight": torch.randn(2, 4), "bias": torch.randn(2)}
    copy_saved(linear, wanted, ["bias"])
    assert all(torch.equal(linear.state_dict()[name], value) for name, value in wanted.items())


STACKS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "r": 65536, "target": "all-linear"},
    "adapter": {"kind": "adapter", "r": 65536},
    "prompt_tuning": {"kind": "prompt_tuning", "num_virtual_tokens": 65536},
    "prefix_tuning": {"kind": "prefix_tuning", "num_virtual_tokens": 65536},
}


@pytest.mark.parametrize("kind", STACKS)
def test_a_stored_stack_takes_no_more_memory_than_its_file(kind: str) -> None:
    stack = Layer({kind: STACKS[kind]}, {}, tensors={"x": torch.zeros(8)}, source="run/final/stack.yaml")
    with pytest.raises(
        RunError, match=r"run/final/stack.yaml: this stack cannot be put on the model: .*ask for a tensor of shape"
    ):
        mount_layer(model(), stack, 0)


def test_a_delta_that_lacks_tensors_is_refused() -> None:
    stack = Layer({"lora": {"kind": "lora", "r": 2}}, {}, tensors={}, source="run/final/stack.yaml")
    with pytest.raises(RunError, match=r"the saved delta lacks .*of mounted0_lora"):
        mount_layer(model(), stack, 0)


def test_all_ways_to_make_a_tensor_count() -> None:
    ways = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
    for make in ways:
        with pytest.raises(ValueError, match="ask for a tensor of shape"), within_file(torch.nn.Linear(1, 1), {}):
            make(SLACK + 10**6)
    with pytest.raises(ValueError, match="ask for"), within_file(torch.nn.Linear(1, 1), {}):
        torch.full((SLACK + 10**6,), 2.0)
    with within_file(torch.nn.Linear(1, 1), {"x": torch.zeros(SLACK)}):
        torch.nn.Linear(SLACK, 2)
