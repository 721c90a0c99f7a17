"""Parallel adapters: what each form reads and adds to, against the formula written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.methods.additive._engines.bottleneck import Bottleneck
from llmrecipe.methods.additive.parallel_adapter import ParallelAdapter
from llmrecipe.models.hooks.hook import all_hooks, first_tensor
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.optimizations import speed_up
from tests.methods.additive.harness import (
    attached,
    base_logits,
    cached_generation_equals_uncached,
    checkpointing_changes_no_gradient,
    fill,
    logits,
    survives_a_round_trip,
    trained,
)
from tests.tiny import roles_for
from tests.trainings import curve, train_recipe

FAMILIES = ["llama", "gpt2", "gemma2", "bert", "distilbert", "t5", "bart", "mixtral", "phi", "gpt_neox", "native", "opt"]
BOTH = {"sites": ["ffn", "attn"], "r": 5}


def reference(hook: Bottleneck, u: Tensor, scale: float | Tensor = 4.0) -> Tensor:
    """s (W_u relu(W_d u + b_d) + b_u)."""
    h = torch.einsum("rd,btd->btr", hook.down, u) + hook.down_bias
    return scale * (torch.einsum("dr,btr->btd", hook.up, h.clamp_min(0)) + hook.up_bias)


def block_of(family: str, **options: object) -> tuple[nn.Module, nn.Module, Tensor]:
    model, _ = attached(family, ParallelAdapter(name="pa", **options))
    fill(model)
    model.double()
    return model, anatomy(model).at("layers.0.block")[0].module, torch.randn(2, 6, 32, dtype=torch.float64)


def off(module: nn.Module, *inputs: Tensor, **more: object) -> Tensor:
    with activate(Context(role="reference")):
        return module(*inputs, **more)


@pytest.mark.parity("parallel_adapter", "formula, float64")
@pytest.mark.parametrize("source", ["normed", "residual"])
@pytest.mark.parametrize("scale", [4.0, 1.0, "learned"])
def test_a_pre_norm_block_is_the_formula(source: str, scale: float | str) -> None:
    model, block, x = block_of("llama", input=source, scale=scale, **BOTH)
    rotary = model.model.rotary_emb(x, torch.arange(6)[None].expand(2, -1))
    attention, feed = block.self_attn.o_proj.pa, block.mlp.pa
    s = [p.scale if scale == "learned" else scale for p in (attention, feed)]
    n = block.input_layernorm(x)
    u = off(block.input_layernorm, x) if source == "normed" else x
    x1 = x + off(block.self_attn, n, attention_mask=None, position_embeddings=rotary)[0] + reference(attention, u, s[0])
    n = off(block.post_attention_layernorm, x1)
    wanted = x1 + off(block.mlp, n) + reference(feed, n if source == "normed" else x1, s[1])
    torch.testing.assert_close(block(x, position_embeddings=rotary), wanted, atol=1e-11, rtol=0)


@pytest.mark.parity("parallel_adapter", "formula, float64")
@pytest.mark.parametrize("source", ["normed", "residual"])
def test_a_post_norm_block_reads_the_stream_either_way(source: str) -> None:
    _, block, x = block_of("bert", input=source, **BOTH)
    attention, output = block.attention, block.output
    y = off(attention.output.dense, off(attention.self, x)[0])
    x1 = attention.output.LayerNorm(x + y + reference(attention.output.dense.pa, x))
    y = off(output.dense, off(block.intermediate, x1))
    wanted = output.LayerNorm(x1 + y + reference(output.dense.pa, x1))
    torch.testing.assert_close(block(x), wanted, atol=1e-11, rtol=0)


@pytest.mark.parity("parallel_adapter", "formula, float64")
def test_a_parallel_block_adds_its_branches_to_the_one_residual() -> None:
    model, block, x = block_of("phi", input="residual", **BOTH)
    rotary = model.model.rotary_emb(x, torch.arange(6)[None].expand(2, -1))
    wanted = first_tensor(off(block, x, position_embeddings=rotary))
    wanted = wanted + reference(block.self_attn.dense.pa, x) + reference(block.mlp.pa, x)
    torch.testing.assert_close(first_tensor(block(x, position_embeddings=rotary)), wanted, atol=1e-11, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_branch_a_linear(family: str) -> None:
    model, _ = attached(family, ParallelAdapter(name="pa", target="attn.q|v + mlp.up|down", r=3, activation="tanh", scale=1.0))
    fill(model)
    x = torch.randn(2, 5, 32)
    site = anatomy(model).at("layers.0.attn.v")[0]
    hook = getattr(site.module, site.name("pa"))
    part = slice(None) if site.rows is None else list(site.indices())
    h = torch.tanh(x @ hook.down.T + hook.down_bias) @ hook.up.T + hook.up_bias
    difference = (site.module(x) - off(site.module, x))[..., part]
    torch.testing.assert_close(difference, h, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "native"])
def test_heads_get_a_prefix_shaped_branch_without_a_softmax(family: str) -> None:
    sites = ["attn", "cross"] if family == "t5" else ["attn"]
    wrapper = ParallelAdapter(name="pa", form="multihead", sites=sites, r=3, scale=2.0)
    base = base_logits(family)
    model, stack = attached(family, wrapper)
    assert torch.equal(logits(model), base)
    modules = 6 if family == "t5" else 2
    assert trained(model) == modules * 4 * 3 * (8 + 8) == next(iter(stack)).memory(model)["trainable"]
    fill(model)
    hook = next(p for _, _, _, p in all_hooks(model))
    q, out = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    wanted = out + 2.0 * torch.einsum("bhtr,her->bhte", torch.einsum("bhte,hre->bhtr", q, hook.down).clamp_min(0), hook.up)
    torch.testing.assert_close(hook.attention(lambda *_: out, q, q, q), wanted, atol=1e-5, rtol=1e-5)
    logits(model).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_starts_at_the_base_and_every_tensor_learns(family: str) -> None:
    wanted = base_logits(family)
    for source in ("normed", "residual"):
        sites = ["ffn", "attn", "cross"]
        model, _ = attached(family, ParallelAdapter(name="pa", sites=sites, r=4, input=source, activation="gelu"))
        assert torch.equal(logits(model), wanted)
        fill(model)
        logits(model).square().mean().backward()
        missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert not missing, source


def test_counts_follow_the_formula() -> None:
    for options, wanted in (
        ({"r": 4}, 2 * (2 * 32 * 4 + 4 + 32)),
        ({}, 2 * (2 * 32 * 16 + 16 + 32)),  # 32 // 2
        ({**BOTH, "scale": "learned"}, 4 * (2 * 32 * 5 + 5 + 32 + 1)),
        ({"r": 4, "bias": False, "layers": "1"}, 2 * 32 * 4),
        ({"sizes": {"0": 0, "1": 6}}, 2 * 32 * 6 + 6 + 32),
        ({"target": "mlp.up|down", "r": 4, "bias": False}, 2 * 2 * 4 * (32 + 48)),
    ):
        model, stack = attached("llama", ParallelAdapter(name="pa", **options))
        assert trained(model) == wanted
        assert next(iter(stack)).memory(model)["trainable"] == wanted
    for family, branches in (("t5", 2 * 1 + 2 * 1), ("bert", 2), ("mixtral", 2)):
        assert trained(attached(family, ParallelAdapter(name="pa", r=4))[0]) == branches * (2 * 32 * 4 + 4 + 32)


def test_a_copy_of_the_model_reads_its_own_blocks() -> None:
    model, _ = attached("bert", ParallelAdapter(name="pa", **BOTH))
    fill(model)
    wanted = logits(model)
    twin = copy.deepcopy(model)
    for _, _, _, hook in all_hooks(model):
        for parameter in hook.parameters():
            parameter.data.zero_()
    assert torch.equal(logits(twin), wanted)
    assert torch.equal(logits(model), base_logits("bert"))


@pytest.mark.parametrize("options", [BOTH, {"form": "multihead", "sites": ["attn"], "r": 3}, {**BOTH, "input": "residual"}])
def test_skipping_unread_rows_and_packing_change_nothing(options: dict) -> None:
    from llmrecipe.data.collate import Sequence

    model, stack = attached("llama", ParallelAdapter(name="pa", **options))
    fill(model)
    rows = [Sequence([5, 9, 3, 60, 7], [0, 0, 0, 1, 1]), Sequence([8, 1, 44], [0, 0, 1])]
    results = [roles_for(model, stack, packed) for packed in (True, False)]
    out = [r.policy(r.layout(rows))["logprobs"] for r in results]
    torch.testing.assert_close(out[0], out[1], atol=2e-5, rtol=1e-5)
    assert any("last block" in line for line in speed_up(model))
    torch.testing.assert_close(results[0].policy(results[0].layout(rows))["logprobs"], out[0], atol=2e-5, rtol=1e-5)


def test_what_cannot_be_is_explained() -> None:
    with pytest.raises(ModelError, match="parallel to attention"):
        attached("llama", ParallelAdapter(name="pa", form="multihead"))
    with pytest.raises(ModelError, match="no linear layer"):
        attached("llama", ParallelAdapter(name="pa", target="norm.attn"))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {**BOTH, "scale": "learned"}),
        ("bart", {"sites": ["ffn", "attn", "cross"], "r": 4}),
        ("t5", {"sites": ["ffn", "attn", "cross"], "r": 4, "input": "residual"}),
        ("gpt2", {"target": "attn.q|v + mlp.down", "r": 4}),
        ("llama", {"form": "multihead", "sites": ["attn"], "r": 3}),
    ],
)
def test_checkpointing_generation_and_files(family: str, options: dict) -> None:
    wrapper = ParallelAdapter(name="pa", activation="gelu", **options)

    def make() -> nn.Module:
        model, _ = attached(family, wrapper)
        fill(model)
        return model

    checkpointing_changes_no_gradient(make)
    cached_generation_equals_uncached(make())
    survives_a_round_trip(family, wrapper)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["r=32"], ["form=multihead", "sites=[attn]"]])
def test_other_places_learn_too(tmp_path, options: list[str]) -> None:
    train_recipe(tmp_path / "run", "parallel_adapter", *(f"stack.parallel_adapter.{o}" for o in ["target=null", *options]))
    losses = [loss for _, loss, _, _ in curve(tmp_path / "run")]
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])
