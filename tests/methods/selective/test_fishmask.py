"""FishMask: the mask, its budget, and training under it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.core.errors import ModelError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.selective._engines import selection
from llmrecipe.methods.selective._engines.counter_rng import uniform
from llmrecipe.methods.selective._engines.sparse_method import base_weights, sparse_hooks
from llmrecipe.methods.selective.fishmask import Fishmask
from tests.methods.probe import language_probe
from tests.tiny import tiny_model


def fish(model: nn.Module, structure: dict[str, Any] | None = None, **options: Any) -> Stack:
    stack = Stack([Fishmask(name="fish", num_samples=options.pop("num_samples", 3), **options)])
    stack.attach(model, {"fish": structure} if structure else None)
    if structure is None:
        stack.calibrate(model, language_probe(model))
    return stack


def hooks(model: nn.Module) -> dict[str, Any]:
    return {hook.source: hook for _, _, hook in sparse_hooks(model, "fish")}


def train(model: nn.Module, stack: Stack, steps: int = 5) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    probe = language_probe(model)
    for step, batch in enumerate(probe.batches(steps)):
        optimizer.zero_grad()
        probe.loss(batch).backward()
        stack.after_backward(model, step)
        optimizer.step()
        stack.after_step(model, step)
    return optimizer


def test_mask_is_the_global_top_of_the_fisher_scores():
    model = tiny_model("llama")
    scores = selection.score_entries(model, language_probe(model), base_weights(model), 3)
    fish(model, density=0.01)
    flat = torch.cat(list(scores.values()))
    k = int(0.01 * flat.numel())
    got = torch.zeros_like(flat, dtype=torch.bool)
    offset = 0
    for name, values in scores.items():
        if name in hooks(model):
            got[offset + hooks(model)[name].idx.long()] = True
        offset += values.numel()
    assert int(got.sum()) == k
    assert flat[got].min() >= flat[~got].max()


def test_exactly_k_train_and_everything_else_is_bit_equal_after_weight_decay():
    model = tiny_model("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stack = fish(model, density=0.02)
    trained = [p for p in model.parameters() if p.requires_grad]
    k = int(0.02 * sum(p.numel() for p in before.values()))
    assert sum(p.numel() for p in trained) == k
    optimizer = train(model, stack)
    assert sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim()) == 2 * k
    held = {name: set(hook.idx.tolist()) for name, hook in hooks(model).items()}
    language_probe(model).loss(next(language_probe(model).batches(1)))
    now = dict(model.named_parameters())
    for name, old in before.items():
        changed = (now[name].reshape(-1) != old.reshape(-1)).nonzero().squeeze(1).tolist()
        assert set(changed) <= held.get(name, set())


@pytest.mark.parity("fishmask", "full fine-tuning, float64")
def test_full_density_equals_full_fine_tuning():
    model, full = tiny_model("llama").double(), tiny_model("llama").double()
    stack = fish(model, density=1.0)
    probe, dense_probe = language_probe(model), language_probe(full)
    sparse = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    dense = torch.optim.AdamW(full.parameters(), lr=1e-2, weight_decay=0.0)
    for step, batch in enumerate(probe.batches(3)):
        for optimizer, p in ((sparse, probe), (dense, dense_probe)):
            optimizer.zero_grad()
            p.loss(batch).backward()
            optimizer.step()
        stack.after_step(model, step)
    stack.wrappers[0].merge(model)
    for name, parameter in full.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], parameter, rtol=1e-6, atol=1e-6)


def test_head_inside_the_budget():
    from transformers import AutoModelForSequenceClassification

    from tests.tiny import tiny_config

    model = AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=3))
    model.new_heads = ["score"]
    base = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("score"))
    assert Fishmask(name="fish", density=0.1).count(model) == int(0.1 * base)
    assert Fishmask(name="fish", density=0.1, budget="with_head").count(model) == int(0.1 * base) - 96
    with pytest.raises(ModelError, match="leaves none"):
        Fishmask(name="fish", density=1e-6).count(model)


def test_resume_keeps_the_mask_and_the_next_step_bit_for_bit():
    model = tiny_model("llama")
    stack = fish(model, density=0.02)
    train(model, stack, 3)
    structure, delta = stack.wrappers[0].structure(model), {k: v.clone() for k, v in stack.wrappers[0].delta(model).items()}
    again = tiny_model("llama")
    other = fish(again, structure, density=0.02)
    other.restore(again, delta)
    other.set_trainable(again)
    assert {n: p.idx.tolist() for n, p in hooks(again).items()} == {n: p.idx.tolist() for n, p in hooks(model).items()}
    train(model, stack, 2)
    train(again, other, 2)
    for name, hook in hooks(again).items():
        assert torch.equal(hook.values, hooks(model)[name].values)


def test_reference_is_the_base_after_training():
    model = tiny_model("llama")
    probe = language_probe(model)
    batch = next(probe.batches(1))
    start = probe.loss(batch).detach()
    stack = fish(model, density=0.05)
    stack.snapshot_reference(model)
    train(model, stack)
    assert not torch.equal(probe.loss(batch), start)
    with torch.no_grad(), stack.reference(model):
        assert torch.equal(probe.loss(batch), start)


def test_a_mask_that_no_gradient_reaches_is_refused():
    model = tiny_model("llama")
    stack = fish(model, density=0.02)
    with pytest.raises(ModelError, match="none of the selected tensors received a gradient"):
        stack.after_backward(model, 0)


def test_memory_is_twenty_bytes_an_entry():
    model = tiny_model("llama")
    planned = Fishmask(name="fish", density=0.02).memory(model)
    stack = fish(model, density=0.02)
    facts = stack.wrappers[0].memory(model)
    # What is set aside of the base is known once the entries are chosen.
    assert facts == {**planned, "base_bytes": 4 * facts["trainable"]}
    assert sum(facts[k] for k in ("optimizer_bytes", "gradient_bytes", "index_bytes")) + 4 * facts["trainable"] == (
        20 * facts["trainable"]
    )


@pytest.mark.parametrize("groups", [1, 3])
def test_a_random_mask_is_the_top_of_numbers_by_address_and_reads_no_example(groups: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selection, "score_entries", lambda *_, **__: pytest.fail("scored an example"))
    model = tiny_model("llama")
    numbers = {n: uniform(f"5:{n}", 0, w.numel).float() for n, w in base_weights(model).items()}
    k = int(0.01 * sum(values.numel() for values in numbers.values()))
    least = torch.cat(list(numbers.values())).sort(descending=True).values[k - 1]
    fish(model, density=0.01, score="random", seed=5, layer_groups=groups)
    assert {n: p.idx.long().tolist() for n, p in hooks(model).items()} == {
        n: (values >= least).nonzero().squeeze(1).tolist() for n, values in numbers.items() if (values >= least).any()
    }


@pytest.mark.slow
def test_fish_beats_a_random_mask_of_the_same_size():
    finals: dict[str, list[float]] = {"fisher": [], "random": []}
    for seed in range(3):
        for score, losses in finals.items():
            model = tiny_model("llama", seed=seed)
            train(model, fish(model, density=0.005, num_samples=32, score=score, seed=seed), 40)
            probe = language_probe(model)
            losses.append(sum(float(probe.loss(b)) for b in probe.batches(16)))
    assert sum(finals["fisher"]) < sum(finals["random"])
