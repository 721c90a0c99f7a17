"""Serial adapters: both placements against the formula written out, in pre-norm and post-norm blocks; counts and promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import Context, activate
from llmrecipe.methods.additive._engines.bottleneck import Bottleneck
from llmrecipe.methods.additive.adapter import Adapter
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.module_map import anatomy
from tests.methods.additive.harness import (
    attached,
    base_logits,
    cached_generation_equals_uncached,
    checkpointing_changes_no_gradient,
    fill,
    logits,
    model_of,
    only_listed_parameters_move,
    survives_a_round_trip,
    trained,
)
from tests.trainings import curve, train_recipe

ALL = ["llama", "gpt2", "gemma2", "qwen3", "bert", "distilbert", "roberta", "t5", "bart", "mixtral", "native", "native-encoder"]
PARALLEL = ["phi", "gpt_neox"]


def reference(hook: Bottleneck, z: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """s (W_u relu(W_d z + b_d) + b_u)."""
    h = torch.einsum("rd,btd->btr", hook.down, z) + hook.down_bias
    return scale * (torch.einsum("dr,btr->btd", hook.up, h.clamp_min(0)) + hook.up_bias)


def block_of(family: str, **options: object) -> tuple[nn.Module, nn.Module, Tensor]:
    """A float64 model with filled adapters, its first block, and a stream."""
    model, _ = attached(family, Adapter(name="adapter", r=5, **options))
    fill(model)
    model.double()
    return model, anatomy(model).at("layers.0.block")[0].module, torch.randn(2, 6, 32, dtype=torch.float64)


def off(module: nn.Module, *inputs: Tensor, **more: object) -> Tensor:
    """A module without its hooks."""
    with activate(Context(role="reference")):
        return module(*inputs, **more)


@pytest.mark.parity("adapter", "formula, float64")
@pytest.mark.parametrize("scale", [1.0, 2.5, "learned", "channel"])
def test_houlsby_in_a_pre_norm_block_is_the_formula(scale: float | str) -> None:
    model, block, x = block_of("llama", scale=scale)
    rotary = model.model.rotary_emb(x, torch.arange(6)[None].expand(2, -1))
    attention, mlp = block.self_attn.o_proj.adapter, block.mlp.adapter
    s = [p.scale if isinstance(scale, str) else scale for p in (attention, mlp)]
    y = off(block.self_attn, block.input_layernorm(x), attention_mask=None, position_embeddings=rotary)[0]
    x1 = x + y + reference(attention, y, s[0])
    y = off(block.mlp, block.post_attention_layernorm(x1))
    wanted = x1 + y + reference(mlp, y, s[1])
    torch.testing.assert_close(block(x, position_embeddings=rotary), wanted, atol=1e-11, rtol=0)


@pytest.mark.parity("adapter", "formula, float64")
def test_pfeiffer_in_a_pre_norm_block_reads_the_stream_behind_the_sum() -> None:
    model, block, x = block_of("llama", placement="pfeiffer")
    rotary = model.model.rotary_emb(x, torch.arange(6)[None].expand(2, -1))
    whole = off(block, x, position_embeddings=rotary)
    wanted = whole + reference(block.adapter, whole)
    torch.testing.assert_close(block(x, position_embeddings=rotary), wanted, atol=1e-11, rtol=0)


@pytest.mark.parity("adapter", "formula, float64")
def test_houlsby_in_a_post_norm_block_is_the_formula() -> None:
    _, block, x = block_of("bert")
    attention, output = block.attention, block.output
    y = attention.output.dense.weight @ off(attention.self, x)[0].transpose(1, 2) + attention.output.dense.bias[:, None]
    y = y.transpose(1, 2)
    x1 = attention.output.LayerNorm(x + y + reference(attention.output.dense.adapter, y))
    y = off(output.dense, block.intermediate(x1))
    wanted = output.LayerNorm(x1 + y + reference(output.dense.adapter, y))
    torch.testing.assert_close(block(x), wanted, atol=1e-11, rtol=0)


@pytest.mark.parity("adapter", "formula, float64")
def test_pfeiffer_in_a_post_norm_block_uses_the_same_norm_twice() -> None:
    _, block, x = block_of("bert", placement="pfeiffer")
    norm = block.output.LayerNorm
    x1 = block.attention(x)[0]
    y = block.output.dense(block.intermediate(x1))
    wanted = off(norm, x1 + y + reference(norm.adapter, off(norm, x1 + y)))
    torch.testing.assert_close(block(x), wanted, atol=1e-11, rtol=0)


@pytest.mark.parametrize("family", [*ALL, *PARALLEL])
def test_starts_at_the_base_and_every_tensor_learns(family: str) -> None:
    wanted = base_logits(family)
    for placement in ("houlsby", "pfeiffer"):
        if family in PARALLEL and placement == "pfeiffer":
            continue
        # Not relu: a random bias may silence every unit of one small bottleneck.
        options = {"placement": placement, "activation": "gelu", "cross_attention": placement == "houlsby"}
        model, _ = attached(family, Adapter(name="adapter", r=4, **options))
        assert torch.equal(logits(model), wanted), placement
        fill(model)
        logits(model).square().mean().backward()
        missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert not missing, placement


@pytest.mark.parametrize("init", ["houlsby", "bert"])
def test_the_published_initializations_are_near_the_base_and_say_so(init: str) -> None:
    wrapper = Adapter(name="adapter", init=init, r=4)
    assert not wrapper.starts_at_base()
    model, stack = attached("llama", wrapper)
    assert not stack.reference_is_off()
    bound, deviation = {"houlsby": (0.02, 0.0088), "bert": (0.2, 0.02)}[init]
    values = torch.cat([getattr(p, n).flatten() for _, _, _, p in all_hooks(model) for n in ("down", "up")])
    assert float(values.abs().max()) <= bound
    assert math.isclose(float(values.std()), deviation, rel_tol=0.15)
    assert not torch.equal(logits(model), logits(model_of("llama")))


def test_adapters_start_differently() -> None:
    model, _ = attached("llama", Adapter(name="adapter", r=4))
    downs = [hook.down for _, _, _, hook in all_hooks(model)]
    assert not any(torch.equal(downs[0], other) for other in downs[1:])


@pytest.mark.parametrize(
    ("options", "each"),
    [
        ({"r": 4}, 2 * 32 * 4 + 4 + 32),
        ({}, 2 * 32 * 2 + 2 + 32),  # 32 // 16
        ({"r": 4, "bias": False}, 2 * 32 * 4),
        ({"r": 4, "scale": "learned"}, 2 * 32 * 4 + 4 + 32 + 1),
        ({"r": 4, "scale": "channel"}, 2 * 32 * 4 + 4 + 32 + 32),
        ({"r": 4, "ln_before": True, "ln_after": True}, 2 * 32 * 4 + 4 + 32 + 4 * 32),
    ],
)
def test_counts_follow_the_formula(options: dict, each: int) -> None:
    for placement, adapters in (("houlsby", 4), ("pfeiffer", 2)):
        model, stack = attached("llama", Adapter(name="adapter", placement=placement, **options))
        assert trained(model) == adapters * each
        assert next(iter(stack)).memory(model)["trainable"] == trained(model)


@pytest.mark.parametrize(("family", "adapters"), [("t5", 2 * 2 + 2 * 2), ("bart", 2 * 2 + 2 * 2), ("bert", 4), ("mixtral", 4)])
def test_cross_attention_only_where_asked(family: str, adapters: int) -> None:
    each = 2 * 32 * 4 + 4 + 32
    assert trained(attached(family, Adapter(name="adapter", r=4))[0]) == adapters * each
    more = 2 if family in ("t5", "bart") else 0
    assert trained(attached(family, Adapter(name="adapter", r=4, cross_attention=True))[0]) == (adapters + more) * each
    if more:
        assert trained(attached(family, Adapter(name="adapter", r=4, side="encoder"))[0]) == 4 * each


def test_layers_and_sizes_choose_where_and_how_wide() -> None:
    model, _ = attached("llama", Adapter(name="adapter", layers="-1", sublayers=["ffn"], r=3))
    assert [path for path, _, _, _ in all_hooks(model)] == ["model.layers.1.mlp"]
    model, stack = attached("llama", Adapter(name="adapter", sizes={"0": 0, "1": 7}))
    assert {hook.down.shape[0] for _, _, _, hook in all_hooks(model)} == {7}
    assert trained(model) == next(iter(stack)).memory(model)["trainable"] == 2 * (2 * 32 * 7 + 7 + 32)


def test_norms_train_where_asked_and_only_in_adapted_blocks() -> None:
    wrapper = Adapter(name="adapter", train_norms=True, layers="0", r=4)
    model, stack = attached("llama", wrapper)
    loaded = {n for n, p in model.named_parameters() if p.requires_grad and "adapter" not in n}
    assert loaded == {"model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"}
    assert not stack.reference_is_off()
    assert set(stack.delta(model)) >= loaded
    survives_a_round_trip("llama", wrapper)
    bert, _ = attached("bert", Adapter(name="adapter", train_norms=True, r=4))
    assert trained(bert) == 2 * (2 * (2 * 32 * 4 + 4 + 32) + 2 * 2 * 32)


@pytest.mark.parametrize("family", PARALLEL)
def test_pfeiffer_is_refused_where_both_sublayers_share_one_residual(family: str) -> None:
    with pytest.raises(ModelError, match="use placement: houlsby"):
        attached(family, Adapter(name="adapter", placement="pfeiffer"))


def test_pfeiffer_on_attention_is_refused() -> None:
    with pytest.raises(ModelError, match="feed-forward only"):
        attached("llama", Adapter(name="adapter", placement="pfeiffer", sublayers=["attn"]))


def test_a_mixture_is_adapted_as_the_sum_of_its_experts() -> None:
    model, _ = attached("mixtral", Adapter(name="adapter", sublayers=["ffn"], r=4))
    fill(model)
    mixture = model.model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    y = off(mixture, x)
    y = y[0] if isinstance(y, tuple) else y
    got = mixture(x)
    torch.testing.assert_close(
        got[0] if isinstance(got, tuple) else got, y + reference(mixture.adapter, y), atol=1e-5, rtol=1e-5
    )


def test_sandwich_norms_come_before_the_adapter() -> None:
    model, _ = attached("gemma2", Adapter(name="adapter"))
    hosts = {path.rsplit(".", 1)[-1] for path, _, _, _ in all_hooks(model)}
    assert hosts == {"post_attention_layernorm", "post_feedforward_layernorm"}


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_lora_acts_inside_the_sublayer_and_the_adapter_behind_it(family: str) -> None:
    orders = []
    for flip in (1, -1):
        model, _ = attached(family, *[Adapter(name="adapter", r=4), Lora(name="lora", target="attn.o + mlp.down")][::flip])
        fill(model)
        hooks = sorted((p, n) for p, _, n, _ in all_hooks(model))
        assert len(hooks) == 8
        host = anatomy(model).at("layers.0.attn.o")[0].module
        x = torch.randn(1, 3, 32)
        y = off(host, x) + host.lora.scale * x @ host.lora.A.T @ host.lora.B.T
        torch.testing.assert_close(host(x), y + reference(host.adapter, y), atol=1e-5, rtol=1e-5)
        orders.append(host)
    assert len(orders) == 2


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", ["llama", "t5", "native"])
def test_checkpointing_generation_and_files(family: str, placement: str) -> None:
    wrapper = Adapter(name="adapter", placement=placement, r=4, scale="learned")

    def make() -> nn.Module:
        model, _ = attached(family, wrapper)
        fill(model)
        return model

    checkpointing_changes_no_gradient(make)
    cached_generation_equals_uncached(make())
    survives_a_round_trip(family, wrapper)


def test_the_base_never_moves_and_masters_are_float32() -> None:
    only_listed_parameters_move("bert", Adapter(name="adapter", placement="pfeiffer", r=4))
    model = model_of("llama").to(torch.bfloat16)
    from llmrecipe.methods._base.stack import Stack

    Stack([Adapter(name="adapter", r=4, ln_before=True)]).attach(model)
    fill(model)
    assert {p.dtype for _, _, _, hook in all_hooks(model) for p in hook.parameters()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


def test_dropout_acts_in_training_only() -> None:
    model, _ = attached("llama", Adapter(name="adapter", r=16, dropout=0.5))
    fill(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.slow
def test_the_lighter_placement_learns_too(tmp_path) -> None:
    train_recipe(tmp_path / "run", "adapter", "stack.adapter.placement=pfeiffer", "epochs=2")
    losses = [loss for _, loss, _, _ in curve(tmp_path / "run")]
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])
