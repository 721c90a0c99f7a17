"""8-bit base weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llmrecipe.core import registry
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._engines.quantized import dense_weight, dequantize_model
from llmrecipe.methods.memory.int8 import Int8

pytest.importorskip("bitsandbytes")


def layer(bias: bool = True) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(128, 96, bias=bias)})


def test_codes_are_rows_scaled_to_127() -> None:
    model = layer()
    w = model["a"].weight.detach().clone()
    Int8(name="int8").attach(model)
    half = w.half().float()
    scale = half.abs().amax(1, keepdim=True)
    codes = (half * (127 / scale)).round()
    assert (model["a"].weight.data.float() - codes).abs().max() <= 1 and model["a"].weight.dtype == torch.int8
    assert torch.equal(dense_weight(model["a"], torch.float32), model["a"].weight.data.float() * (scale / 127))
    assert (dense_weight(model["a"], torch.float32) - w).norm() / w.norm() < 0.01


def test_training_and_eval_compute_the_same_and_the_gradient_is_that_of_the_dequantized_layer() -> None:
    model = layer()
    Int8(name="int8").attach(model)
    x = torch.randn(2, 5, 128, requires_grad=True)
    trained = model.train()["a"](x)
    trained.square().sum().backward()
    with torch.no_grad():
        evaluated = model.eval()["a"](x)
    assert torch.equal(trained, evaluated)
    assert torch.equal(model.train()["a"](x), evaluated)
    dense = nn.Linear(128, 96)
    dense.weight.data, dense.bias.data = dense_weight(model["a"], torch.float32), model["a"].bias.data
    y = x.detach().clone().requires_grad_()
    dense(y).square().sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-4)


def test_memory_counts_codes_and_scales() -> None:
    model = layer()
    wrapper = Int8(name="int8")
    wrapper.attach(model)
    weight = model["a"].weight
    assert wrapper.memory(model)["base_bytes"] == weight.numel() + 4 * weight.SCB.numel()


def test_quantized_weights_never_train() -> None:
    model = layer()
    Stack([Int8(name="int8")]).attach(model)
    assert not model["a"].weight.requires_grad and model["a"].bias.requires_grad


def test_loading_in_8_bits_equals_converting_in_memory(tmp_path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    wrapper = Int8(name="int8")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **wrapper.load_kwargs()).eval()
    lora = registry.load_class("stack", "lora")
    for part in (loaded, model):
        Stack([wrapper, lora(name="lora", target="all-linear")]).attach(part)
    ids = torch.arange(12)[None]
    live = model(ids).logits
    assert torch.allclose(loaded(ids).logits, live, atol=1e-6)
    assert dequantize_model(model) == 7
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert torch.allclose(model(ids).logits, live, atol=1e-5)


@pytest.mark.parametrize("used", [False, True])
def test_a_layer_that_is_moved_takes_its_codes_and_scales_along(used: bool) -> None:
    """torch moves a weight in place where it can, as to a GPU, and the library has another name for the codes beside it."""
    model = layer()
    Int8(name="int8").attach(model)
    moved, x = model["a"], torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    wanted = moved(x) if used else None
    model._apply(lambda tensor: tensor.clone())
    holders = [one for one in (moved.weight, moved.state) if one.CB is not None]
    assert [one is moved.state for one in holders] == [used]
    assert holders[0].CB.data_ptr() == moved.weight.data_ptr()
    assert wanted is None or torch.equal(moved(x), wanted)
    places: list[torch.device] = []
    holders[0].SCB = SimpleNamespace(to=places.append)
    model._apply(lambda tensor: tensor.clone())
    assert places == [moved.weight.device]
