"""The memory estimate against what is measured, and the instruments against sizes worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core import registry
from llmrecipe.core.forward_context import activate
from llmrecipe.data.collate import Sequence, pack
from llmrecipe.engine.forward import Engine
from llmrecipe.methods._base.stack import Stack
from llmrecipe.optim.optimizer import build_optimizer, parameter_groups
from llmrecipe.training.memory_estimate import (
    activation_elements,
    estimate_memory,
    optimizer_bytes,
    retained_bytes,
    saved_bytes,
)
from tests.tiny import tiny_model

LLAMA = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4}


class Parked(torch.autograd.Function):
    """y = 2 x, with its input kept on `ctx` inside a list, where saved-tensor hooks do not look."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.hidden = [{"x": x}]
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 2


def test_instruments_by_hand():
    """A 10x6 input through a 6 -> 5 layer and a tanh: kept are the input (240 bytes) and the tanh's output (200)."""
    layer, x = nn.Linear(6, 5), torch.randn(10, 6)
    loss, saved = saved_bytes(lambda: layer(x).tanh().sum(), layer.parameters())
    assert saved == 240 + 200 == retained_bytes(loss, layer.parameters())
    layer.weight.requires_grad_(False)
    loss, saved = saved_bytes(lambda: layer(x).tanh().sum(), layer.parameters())
    assert saved == 200 == retained_bytes(loss, layer.parameters()), "a frozen layer does not keep its input"


def test_a_view_keeps_all_of_its_base():
    x = torch.randn(128, 512)
    w = nn.Parameter(torch.randn(64, 64))
    views = (x[:, :64] @ w + x[:, 64:128] @ w).sum()
    copies = (x[:, :64].clone() @ w + x[:, 64:128].clone() @ w).sum()
    assert retained_bytes(views, [w]) == 128 * 512 * 4
    assert retained_bytes(copies, [w]) == 2 * 128 * 64 * 4


def test_the_walk_finds_what_hooks_do_not_see():
    x = torch.randn(7, 3, requires_grad=True)
    h = x.exp()
    loss, saved = saved_bytes(lambda: Parked.apply(h).sum(), [x, h])
    assert saved == 0
    assert retained_bytes(loss, [x]) == 7 * 3 * 4


def measured(family: str, kind: str | None, **sizes: int) -> tuple[int, int]:
    model = tiny_model(family, **sizes)
    stack = Stack([registry.load_class("stack", kind)(name=kind, target="attn.q|v", r=8)] if kind else [])
    stack.attach(model)
    batch = pack([Sequence(list(range(3, 60)), [1] * 57) for _ in range(4)])
    with activate(batch.context("policy")):
        hidden = Engine(model.train()).hidden(batch)
    kept = retained_bytes(hidden.float().sum(), [*model.parameters(), *model.buffers()])
    return kept, 4 * activation_elements(model, batch.input_ids.numel())


@pytest.mark.parametrize("kind", [None, "lora"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mixtral"])
def test_activations_are_estimated_within_15_percent(family, kind):
    sizes = {"n_embd": 128, "n_layer": 4} if family == "gpt2" else LLAMA
    kept, estimated = measured(family, kind, **sizes)
    assert 0.85 < estimated / kept < 1.15, (estimated, kept)


@pytest.mark.parametrize("kind", registry.names("optim"))
def test_trained_numbers_gradients_and_optimizer_state_are_exact(kind):
    """Everything but activations is a closed form that holds to the byte."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=96)
    stack = Stack([])
    config = registry.load_class("optim", kind)(lr=1e-4)
    optimizer = build_optimizer(config, parameter_groups(model, config))
    guess = estimate_memory(model, stack, config, tokens=64)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    parameters = list(model.parameters())
    assert guess.trained == sum(p.numel() for p in parameters)
    assert guess.gradients == sum(p.grad.numel() * p.grad.element_size() for p in parameters)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert guess.weights == guess.gradients + buffers
    state = optimizer_bytes(optimizer)
    # Two code books of 1 KB are shared; Muon's closed form cannot tell an embedding, which AdamW steps, from a matrix.
    books = 1024 * len({v.data_ptr() for s in optimizer.state.values() for k, v in s.items() if k.startswith("qmap")})
    if kind == "muon":
        tables = [p for n, p in model.named_parameters() if "embed" in n or "lm_head" in n]
        state -= sum(4 * p.numel() + 4 for p in tables)
    assert guess.optimizer == state - books


def test_the_estimate_of_an_adapter_on_the_meta_device_equals_the_one_on_the_cpu():
    from transformers import AutoModelForCausalLM

    guesses = []
    for device in ("meta", "cpu"):
        config = tiny_model("llama").config
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config)
            stack = Stack([registry.load_class("stack", "lora")(name="lora", target="attn.q|v", r=4)])
            stack.attach(model)
        guesses.append(estimate_memory(model, stack, registry.load_class("optim", "adamw")(), tokens=128, targets=32))
    assert guesses[0] == guesses[1]
    # q and v of 2 blocks: 4 (32 + 32) and 4 (32 + 16) numbers.
    assert guesses[0].trained == 2 * (4 * 64 + 4 * 48)
    assert guesses[0].gradients == 4 * guesses[0].trained
    assert guesses[0].optimizer == 8 * guesses[0].trained + 4 * 8
    assert guesses[0].rows()[-1] == ("total", sum(v for _, v in guesses[0].rows()[:-1]))


def test_checkpointing_keeps_block_inputs_and_one_block():
    model = tiny_model("llama", num_hidden_layers=6)
    whole, checkpointed = activation_elements(model, 10), activation_elements(model, 10, checkpointing=True)
    block = (whole // 10 - 32) // 6
    assert checkpointed == 10 * (6 * 32 + block)


def test_blocks_below_the_first_trained_one_keep_nothing():
    model = tiny_model("llama", num_hidden_layers=4).requires_grad_(False)
    assert activation_elements(model, 10) == 0
    model.model.layers[3].mlp.down_proj.weight.requires_grad_(True)
    one = activation_elements(model, 10)
    model.model.layers[2].mlp.down_proj.weight.requires_grad_(True)
    assert activation_elements(model, 10) == 2 * one - 10 * 32


def test_mezo_needs_no_gradients_and_no_activations():
    model = tiny_model("llama")
    stack = Stack([registry.load_class("stack", "mezo")(name="mezo")])
    stack.attach(model)
    guess = estimate_memory(model, stack, registry.load_class("optim", "adamw")(), tokens=64)
    assert (guess.gradients, guess.optimizer, guess.activations) == (0, 0, 0) and guess.weights > 0
