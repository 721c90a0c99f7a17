"""SPT: sensitivities, allocation under a budget, mixed training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmrecipe.core.errors import ModelError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._engines.low_rank import LowRank
from llmrecipe.methods.selective._engines.sparse_method import sparse_hooks
from llmrecipe.methods.selective._engines.spt_allocation import SequentialAdapter, Tunable, allocate, cost
from llmrecipe.methods.selective._engines.top_k import pattern
from llmrecipe.methods.selective.spt import Spt
from llmrecipe.models.hooks.hook import all_hooks
from tests.methods.probe import language_probe
from tests.tiny import tiny_model


def tuned(model: nn.Module, structure: dict[str, Any] | None = None, **options: Any) -> tuple[Spt, Stack]:
    stack = Stack([Spt(name="spt", **{"num_batches": 2, "batch_size": 4, "r": 2, "dropout": 0.0, **options})])
    stack.attach(model, {"spt": structure} if structure else None)
    if structure is None:
        stack.calibrate(model, language_probe(model))
    return stack.wrappers[0], stack  # type: ignore[return-value]


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def train(model: nn.Module, stack: Stack, steps: int = 3) -> None:
    probe = language_probe(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for step, batch in enumerate(probe.batches(steps)):
        optimizer.zero_grad()
        probe.loss(batch).backward()
        stack.after_backward(model, step)
        optimizer.step()
        stack.after_step(model, step)


@pytest.mark.parity("spt", "batch autograd")
def test_sensitivity_is_the_square_of_a_batch_gradient():
    model = tiny_model("llama")
    wrapper = Spt(name="spt", num_batches=2, batch_size=4)
    names = ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]
    got = wrapper._scores(model, language_probe(model), names)
    probe = language_probe(model)
    for name in names:
        parameter = dict(model.named_parameters())[name]
        want = sum(torch.autograd.grad(probe.loss(b), parameter)[0].reshape(-1) ** 2 for b in probe.batches(2, 4))
        torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-10)


def reference_allocation(scores: list[list[float]], tunables: list[Tunable], tau: int) -> int:
    """The rule written out: rank everything, count, convert."""
    ranked = sorted(((-v, t, i) for t, values in enumerate(scores) for i, v in enumerate(values)))[:tau]
    total = 0
    for t, tunable in enumerate(tunables):
        count = sum(owner == t for _, owner, _ in ranked)
        total += tunable.whole if count and count >= tunable.threshold else count
    return total


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=12), min_size=2, max_size=4), st.data())
def test_allocation_is_the_largest_feasible_of_all_taus(values: list[list[int]], data: Any):
    scores = [[float(v) for v in row] for row in values]
    tunables = []
    for number, row in enumerate(scores):
        whole = data.draw(st.integers(2, 8))
        ratio = data.draw(st.sampled_from([2.0, 3.0]))
        tunables.append(Tunable(str(number), len(row), whole, whole / ratio, "path" if number % 2 else ""))
    budget = data.draw(st.integers(1, 30))
    size = sum(map(len, scores))
    totals = [reference_allocation(scores, tunables, tau) for tau in range(size + 1)]
    assert totals == sorted(totals)
    best = max(tau for tau in range(size + 1) if totals[tau] <= budget)
    keys = [pattern(torch.tensor(row)) for row in scores]
    if totals[best] == 0:
        with pytest.raises(ModelError):
            allocate(tunables, keys, budget)
        return
    got = allocate(tunables, keys, budget)
    assert (got.tau, got.total) == (best, totals[best])


def test_allocation_by_hand():
    # Ranks: a holds 9, 8, 7, 1; v holds 6, 5; b holds 4, 3, 2. P of a and b is 4 at a ratio of 2, v costs 2 from 1 on.
    tunables = [Tunable("a", 4, 4, 2.0, "A"), Tunable("v", 2, 2, 1.0), Tunable("b", 3, 4, 2.0, "B")]
    keys = [pattern(torch.tensor(row)) for row in ([9.0, 8, 7, 1], [6.0, 5], [4.0, 3, 2])]
    got = allocate(tunables, keys, 7)
    assert (got.tau, got.total, got.structured) == (6, 7, ["A"])
    assert {n: i.tolist() for n, i in got.entries.items()} == {"v": [0, 1], "b": [0]}
    assert cost(tunables, [3, 2, 2], False) == 10


@pytest.mark.parametrize("structured", ["lora", "adapter"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_count_is_within_the_budget_and_equals_what_trains(structured: str, family: str):
    model = tiny_model(family)
    probe = language_probe(model)
    batch = next(probe.batches(1))
    want = probe.loss(batch).detach()
    wrapper, _ = tuned(model, structured=structured, budget=1200)
    assert 0 < trained(model) <= 1200
    assert sum(n for _, n in wrapper.describe(model)) == trained(model) == wrapper.memory(model)["trainable"]
    torch.testing.assert_close(probe.loss(batch), want, rtol=1e-6, atol=1e-6)
    hook = LowRank if structured == "lora" else SequentialAdapter
    assert any(isinstance(p, hook) for _, _, _, p in all_hooks(model, "spt"))
    assert list(sparse_hooks(model, "spt"))


def test_a_matrix_is_never_both_and_embeddings_stay_frozen():
    model = tiny_model("llama")
    wrapper, _ = tuned(model, budget=1200)
    structured = set(wrapper._structured(model))
    single = {hook.source.rpartition(".")[0] for _, _, hook in sparse_hooks(model, "spt") if len(hook.shape) > 1}
    assert structured and single and not structured & single
    assert not any("embed" in s or "lm_head" in s for s in structured | single)


def test_everything_else_stays_bit_equal_and_merging_is_exact():
    model = tiny_model("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapper, stack = tuned(model, budget=1200)
    train(model, stack)
    probe = language_probe(model)
    batch = next(probe.batches(1))
    want = probe.loss(batch).detach()
    held = {hook.source: set(hook.idx.tolist()) for _, _, hook in sparse_hooks(model, "spt")}
    for name, old in before.items():
        changed = (dict(model.named_parameters())[name].reshape(-1) != old.reshape(-1)).nonzero().squeeze(1).tolist()
        assert set(changed) <= held.get(name, set())
    wrapper.merge(model)
    torch.testing.assert_close(probe.loss(batch), want, rtol=1e-5, atol=1e-6)
    assert [n for n, _ in model.named_parameters()] == list(before)


def test_adapters_are_not_merged():
    model = tiny_model("llama")
    wrapper, _ = tuned(model, structured="adapter", budget=1200)
    with pytest.raises(ModelError, match="not linear"):
        wrapper.merge(model)


def test_saved_allocation_restores_bit_for_bit():
    model = tiny_model("llama")
    wrapper, stack = tuned(model, budget=1200)
    train(model, stack)
    structure, delta = wrapper.structure(model), wrapper.delta(model)
    again = tiny_model("llama")
    _, other = tuned(again, structure, budget=1200)
    other.restore(again, delta)
    batch = next(language_probe(model).batches(1))
    assert torch.equal(language_probe(again).loss(batch), language_probe(model).loss(batch))


def test_structured_only_and_small_budgets():
    model = tiny_model("llama")
    tuned(model, budget=1200, structured_only=True, structured_vector=False)
    assert not list(sparse_hooks(model, "spt")) and trained(model) > 0
    with pytest.raises(ModelError, match="structured_only"):
        tuned(tiny_model("llama"), budget=5, structured_only=True, structured_vector=False)
    with pytest.raises(ModelError, match="leaves nothing"):
        tuned(tiny_model("llama"), budget=1e-9)
