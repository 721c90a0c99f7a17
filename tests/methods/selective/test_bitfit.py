"""BitFit: counts, missing biases, fused slices, key biases, merging."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.core.errors import ModelError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.selective.bitfit import Bitfit
from tests.tiny import tiny_config, tiny_model


def attached(model: nn.Module, **options: Any) -> tuple[Bitfit, Stack]:
    stack = Stack([Bitfit(name="bitfit", **options)])
    stack.attach(model)
    return stack.wrappers[0], stack  # type: ignore[return-value]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def loss_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(seed))
    # A fixed linear readout: every logit matters, so no gradient is zero by accident.
    logits = model(input_ids=ids).logits.double()
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)).sum()


def bert(**more: Any) -> nn.Module:
    from transformers import BertModel

    torch.manual_seed(0)
    return BertModel(tiny_config("bert", **more))


def test_bert_base_and_large_have_the_papers_count():
    from transformers import BertConfig, BertModel

    for sizes, count in (((768, 12, 12, 3072), 102_912), ((1024, 24, 16, 4096), 272_384)):
        width, layers, heads, ffn = sizes
        config = BertConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=ffn)
        with torch.device("meta"):
            model = BertModel(config)
            attached(model)
        assert sum(p.numel() for p in trained(model).values()) == count
        assert count == layers * 11 * width + 2 * width


def test_llama_refuses_and_lists_what_is_missing():
    with pytest.raises(ModelError, match=r"14 projections.*attn.q x2.*missing=add_zero"):
        attached(tiny_model("llama"))
    with pytest.raises(ModelError, match="none of the requested biases"):
        attached(tiny_model("llama"), missing="existing_only")


def test_qwen2_counts_the_existing_ones_and_trains_only_those():
    with pytest.raises(ModelError, match=r"biases exist at attn.q x2, attn.k x2, attn.v x2"):
        attached(tiny_model("qwen2"))
    model = tiny_model("qwen2")
    attached(model, missing="existing_only")
    assert len(trained(model)) == 6
    assert sum(p.numel() for p in trained(model).values()) == 2 * (32 + 16 + 16)


def test_add_zero_is_identity_with_the_closed_form_count():
    model = tiny_model("llama", num_hidden_layers=3, hidden_size=64, intermediate_size=112)
    before = loss_of(model)
    attached(model, missing="add_zero")
    assert torch.equal(loss_of(model), before)
    assert sum(p.numel() for p in trained(model).values()) == 3 * (64 + 32 + 32 + 64 + 112 + 112 + 64)
    attached(tiny_model("llama"), missing="add_zero", add_norm_bias=True)


@pytest.mark.parity("bitfit", "autograd of every weight, float64")
def test_every_bias_gets_the_gradient_full_fine_tuning_gives_it():
    model = tiny_model("gpt2").double()
    reference = copy.deepcopy(model)
    attached(model)
    loss_of(model).backward()
    loss_of(reference).backward()
    wanted = {n: p.grad for n, p in reference.named_parameters() if n.endswith("bias")}
    got = {n.replace("bitfit.bias", "bias"): p.grad for n, p in trained(model).items()}
    assert got.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-12, atol=1e-12)
    assert all(p.grad is None for n, p in model.named_parameters() if "bitfit" not in n)


def test_fused_slices_train_their_own_elements_only():
    model = tiny_model("gpt2").double()
    reference = copy.deepcopy(model)
    attached(model, terms=["query", "intermediate"])
    names = trained(model)
    assert sum(p.numel() for p in names.values()) == 2 * (32 + 4 * 32)
    loss_of(model).backward()
    loss_of(reference).backward()
    full = reference.transformer.h[0].attn.c_attn.bias.grad
    torch.testing.assert_close(names["transformer.h.0.attn.c_attn.bitfit__q.bias"].grad, full[:32], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("family", "acts"), [("gpt2", False), ("bert", False), ("llama", True)])
def test_key_bias_acts_only_with_rotary_positions(family: str, acts: bool):
    more = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    model = tiny_model(family, **more).double()
    wrapper, _ = attached(model, terms=["key", "query"])
    loss_of(model).backward()
    grads = {n: p.grad.abs().max().item() for n, p in trained(model).items()}
    key = max(g for n, g in grads.items() if any(k in n for k in ("bitfit__k", "k_proj", ".key.")))
    query = max(g for n, g in grads.items() if any(k in n for k in ("bitfit__q", "q_proj", ".query.")))
    assert query > 1e-6
    assert (key > 1e-3 * query) if acts else (key < 1e-9 * query)
    dead = [what for what, _ in wrapper.describe(model) if "without effect" in what]
    assert bool(dead) is not acts


def test_training_leaves_the_base_bit_equal_and_role_reference_sees_it():
    model = tiny_model("gpt2")
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    start = loss_of(model)
    _, stack = attached(model)
    stack.snapshot_reference(model)
    optimizer = torch.optim.AdamW(list(trained(model).values()), lr=1e-2, weight_decay=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in base.items())
    assert not torch.equal(loss_of(model), start)
    with stack.reference(model):
        torch.testing.assert_close(loss_of(model), start, rtol=0, atol=0)


def test_delta_restores_bit_for_bit_and_holds_biases_only():
    model = tiny_model("gpt2")
    wrapper, _ = attached(model)
    with torch.no_grad():
        for p in trained(model).values():
            p.add_(torch.randn_like(p))
    delta = wrapper.delta(model)
    assert sum(v.numel() for v in delta.values()) == sum(p.numel() for p in trained(model).values())
    other = tiny_model("gpt2")
    attached(other)[1].restore(other, delta)
    assert torch.equal(loss_of(model), loss_of(other))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_merged_model_saves_and_reloads_in_plain_transformers(family: str, tmp_path: Any):
    from transformers import AutoModelForCausalLM

    model = tiny_model(family)
    wrapper, _ = attached(model, missing="add_zero" if family == "llama" else "error")
    with torch.no_grad():
        for p in trained(model).values():
            p.add_(torch.randn_like(p))
    want = loss_of(model)
    wrapper.merge(model)
    torch.testing.assert_close(loss_of(model), want, rtol=1e-6, atol=1e-6)
    assert not [n for n, _ in model.named_parameters() if "bitfit" in n]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loss_of(again), want, rtol=1e-6, atol=1e-6)


def test_merging_added_biases_is_refused_where_the_family_has_no_flag():
    model = tiny_model("qwen3")
    wrapper, _ = attached(model, missing="add_zero")
    with pytest.raises(ModelError, match="no config flag"):
        wrapper.merge(model)


def test_prediction_head_bias_is_trained_once():
    model = tiny_model("bert").double()
    attached(model)
    assert sum("bitfit" in n and "predictions" in n for n in trained(model)) == 3
    loss_of(model).backward()
    assert all(p.grad is not None for n, p in trained(model).items() if "pooler" not in n)


def test_bfloat16_base_keeps_float32_masters():
    model = tiny_model("gpt2").to(torch.bfloat16)
    attached(model)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    loss_of(model).backward()


def test_whole_fused_feed_forward_is_taken_once():
    model = tiny_model("phi3")
    attached(model, terms=["intermediate"], missing="add_zero")
    assert sum(p.numel() for p in trained(model).values()) == 2 * 2 * 48
