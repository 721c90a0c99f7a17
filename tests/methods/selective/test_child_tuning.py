"""Child-tuning: masks by address, the masked optimizer step, the Fisher child."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.selective._engines import selection
from llmrecipe.methods.selective._engines.counter_rng import bernoulli as child
from llmrecipe.methods.selective._engines.sparse_method import base_weights, sparse_hooks
from llmrecipe.methods.selective.child_tuning import ChildTuning
from tests.methods.probe import language_probe
from tests.tiny import tiny_model


def tuned(model: nn.Module, **options: Any) -> Stack:
    stack = Stack([ChildTuning(name="child", **options)])
    stack.attach(model)
    stack.calibrate(model, language_probe(model))
    return stack


def train(model: nn.Module, stack: Stack, steps: int, first: int = 0, **options: Any) -> torch.optim.Optimizer:
    options = {"lr": 1e-2, "weight_decay": 0.1} | options
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **options)
    probe = language_probe(model)
    for step, batch in enumerate(probe.batches(first + steps)):
        if step < first:
            continue
        optimizer.zero_grad()
        probe.loss(batch).backward()
        stack.after_backward(model, step)
        optimizer.step()
        stack.after_step(model, step)
    return optimizer


def test_masks_are_functions_of_their_address():
    whole = child("0:1:a", 0, 1000, 0.3)
    parts = torch.cat([child("0:1:a", i, 100, 0.3) for i in range(0, 1000, 100)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, child("0:2:a", 0, 1000, 0.3))
    assert not torch.equal(whole, child("1:1:a", 0, 1000, 0.3))
    assert child("0:1:a", 0, 50, 1.0).all()


def test_masks_are_fair_and_independent_of_their_neighbours():
    n, p = 200_000, 0.3
    a, b = child("0:1:a", 0, n, p).double(), child("0:2:a", 0, n, p).double()
    spread = (p * (1 - p) / n) ** 0.5
    assert abs(a.mean() - p) < 5 * spread
    assert abs((a * b).mean() - p * p) < 5 * spread
    assert abs((a[1:] * a[:-1]).mean() - p * p) < 5 * spread


def test_the_masked_gradient_is_unbiased():
    model = tiny_model("llama")
    stack = tuned(model, variant="f", p=0.4)
    probe = language_probe(model)
    batch = next(probe.batches(1))
    probe.loss(batch).backward()
    parameter = model.model.layers[0].mlp.up_proj.weight
    grad = parameter.grad.clone()
    mean = torch.zeros_like(grad)
    draws = 400
    for step in range(draws):
        parameter.grad = grad.clone()
        stack.after_backward(model, step)
        mean += parameter.grad / draws
    spread = grad.abs() * ((1 - 0.4) / 0.4 / draws) ** 0.5
    assert ((mean - grad).abs() <= 6 * spread + 1e-12).all()


@pytest.mark.parity("child_tuning", "AdamW on masked gradients, float64")
def test_f_steps_equal_a_reference_adamw_on_the_same_masks_in_float64():
    model = tiny_model("llama").double()
    reference = copy.deepcopy(model)
    stack = tuned(model, variant="f", p=0.3, seed=7)
    train(model, stack, 5)
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in reference.named_parameters()}
    probe = language_probe(reference)
    for step, batch in enumerate(probe.batches(5)):
        reference.zero_grad()
        probe.loss(batch).backward()
        with torch.no_grad():
            for name, p in reference.named_parameters():
                mask = child(f"7:{step}:{name}", 0, p.numel(), 0.3).view_as(p)
                g = p.grad * mask / 0.3
                m, v = moments[name]
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                p.mul_(1 - 1e-2 * 0.1)
                p.sub_(1e-2 * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))
    for name, p in reference.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], p, rtol=1e-9, atol=1e-11)


def test_update_masking_holds_masked_entries_still():
    model = tiny_model("llama")
    stack = tuned(model, variant="f", p=0.3, mask_target="update")
    for step in range(3):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        train(model, stack, 1, first=step)
        for name, p in model.named_parameters():
            mask = child(f"0:{step}:{name}", 0, p.numel(), 0.3).view_as(p)
            assert torch.equal(p[~mask], before[name][~mask])
            assert not mask.any() or not torch.equal(p[mask], before[name][mask])


def test_f_trains_everything_and_says_so():
    model = tiny_model("llama")
    stack = tuned(model, variant="f")
    total = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == total
    assert list(stack.wrappers[0].describe(model)) == [("every tensor of 'all' (regularised full fine-tuning)", total)]
    assert stack.wrappers[0].delta(model).keys() == dict(model.named_parameters()).keys()


def test_f_can_mask_what_lora_trains():
    from llmrecipe.methods.reparameterized.lora import Lora

    model = tiny_model("llama")
    stack = Stack([Lora(name="lora"), ChildTuning(name="child", variant="f", scope="trainable", p=0.5)])
    stack.attach(model)
    probe = language_probe(model)
    probe.loss(next(probe.batches(1))).backward()
    hook = model.model.layers[0].self_attn.q_proj.lora
    grad = hook.B.grad.clone()
    stack.after_backward(model, 4)
    mask = child("0:4:model.layers.0.self_attn.q_proj.lora.B", 0, grad.numel(), 0.5).view_as(grad)
    torch.testing.assert_close(hook.B.grad, grad * mask / 0.5, rtol=1e-6, atol=0)


def test_d_takes_the_top_of_the_blocks_and_freezes_the_rest_bit_for_bit():
    model = tiny_model("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    scores = selection.score_entries(model, language_probe(model), base_weights(model, "blocks"), 3)
    stack = tuned(model, p=0.1, rest="freeze", num_samples=3)
    held = {hook.source: set(hook.idx.tolist()) for _, _, hook in sparse_hooks(model, "child")}
    assert sum(map(len, held.values())) == int(0.1 * sum(s.numel() for s in scores.values()))
    worst = min(float(scores[n][list(i)].min()) for n, i in held.items())
    assert all(float(s.max()) <= worst or n in held for n, s in scores.items())
    train(model, stack, 5)
    language_probe(model).loss(next(language_probe(model).batches(1)))
    for name, p in before.items():
        changed = (dict(model.named_parameters())[name].reshape(-1) != p.reshape(-1)).nonzero().squeeze(1).tolist()
        assert set(changed) <= held.get(name, set())


def test_d_trains_what_lies_outside_the_blocks():
    model = tiny_model("llama")
    stack = tuned(model, p=0.1, num_samples=2)
    loaded = {n for n, p in model.named_parameters() if p.requires_grad and ".child" not in n}
    assert loaded == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    start = model.lm_head.weight.detach().clone()
    train(model, stack, 2)
    assert not torch.equal(start, model.lm_head.weight)
    delta = stack.wrappers[0].delta(model)
    assert loaded <= delta.keys()
    again = tiny_model("llama")
    other = Stack([ChildTuning(name="child", p=0.1)])
    other.attach(again, {"child": stack.wrappers[0].structure(model)})
    other.restore(again, delta)
    batch = next(language_probe(model).batches(1))
    assert torch.equal(language_probe(again).loss(batch), language_probe(model).loss(batch))


def test_code_compat_clips_each_tensor_of_a_batch_gradient():
    model = tiny_model("llama").double()
    probe = language_probe(model)
    weights = base_weights(model, "layers.0.mlp.up")
    got = selection.score_entries(model, probe, weights, 1, rows=None, reduction="mean", training=True, clip=1e-3)
    name = next(iter(weights))
    grad = torch.autograd.grad(probe.loss(next(probe.batches(1))), dict(model.named_parameters())[name])[0]
    want = (grad * min(1.0, 1e-3 / (float(grad.norm()) + 1e-6))) ** 2
    torch.testing.assert_close(got[name], want.reshape(-1), rtol=1e-4, atol=1e-18)


def test_float32_masters_of_an_opened_bfloat16_base():
    model = tiny_model("llama").to(torch.bfloat16)
    tuned(model, variant="f")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("variant", ["f", "d"])
def test_quantized_bases(variant: str):
    bnb = pytest.importorskip("bitsandbytes")
    from llmrecipe.core.errors import ModelError

    model = tiny_model("llama")
    layer = bnb.nn.Linear4bit(32, 48, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(model.model.layers[0].mlp.up_proj.weight.data, requires_grad=False, quant_type="nf4")
    model.model.layers[0].mlp.up_proj = layer.to("cpu")
    if variant == "f":
        with pytest.raises(ModelError, match="quantized"):
            tuned(model, variant="f")
        return
    stack = tuned(model, p=0.2, rest="freeze", num_samples=2)
    modes = {hook.source: hook.mode for _, _, hook in sparse_hooks(model, "child")}
    assert modes["model.layers.0.mlp.up_proj.weight"] == "term"
    start = layer.weight.data.clone()
    train(model, stack, 2)
    values = next(p.values for _, _, p in sparse_hooks(model, "child") if p.mode == "term")
    assert values.abs().max() > 0 and torch.equal(layer.weight.data, start)
