"""Diff pruning: gates, the expected L0 norm, the phases."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import checkpoint_contexts
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.selective._engines.counter_rng import uniform
from llmrecipe.methods.selective._engines.hard_concrete import DiffGate, gate
from llmrecipe.methods.selective._engines.sparse_method import sparse_hooks
from llmrecipe.methods.selective.diff_pruning import DiffPruning
from llmrecipe.models.hooks.hook import all_hooks
from tests.methods.probe import language_probe
from tests.tiny import tiny_model


def pruned(model: nn.Module, structure: dict[str, Any] | None = None, **options: Any) -> tuple[DiffPruning, Stack]:
    stack = Stack([DiffPruning(name="diff", **options)])
    stack.attach(model, {"diff": structure} if structure else None)
    return stack.wrappers[0], stack  # type: ignore[return-value]


def gates(model: nn.Module) -> dict[str, DiffGate]:
    return {p.source: p for _, _, _, p in all_hooks(model, "diff") if isinstance(p, DiffGate)}


def randomise(model: nn.Module, wide: bool = True) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for hook in gates(model).values():
            hook.w.normal_(std=0.05)
            hook.alpha.normal_(std=2.0)
            if hook.group is not None:
                hook.group.normal_(std=0.7)


def run(model: nn.Module, stack: Stack, steps: int, first: int = 0, optimizer: Any = None) -> torch.optim.Optimizer:
    probe = language_probe(model)

    def fresh() -> torch.optim.Optimizer:
        scales = {n: g.lr_scale for g in stack.groups(model) for n in g.names}
        rows = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        return torch.optim.AdamW([{"params": [p], "lr": 1e-3 * scales.get(n, 1.0)} for n, p in rows], weight_decay=0.1)

    optimizer = optimizer or fresh()
    for step, batch in enumerate(probe.batches(first + steps)):
        if step < first:
            continue
        if stack.before_step(model, step):
            optimizer = fresh()
        optimizer.zero_grad()
        (probe.loss(batch) + stack.penalty(model)).backward()
        stack.after_backward(model, step)
        optimizer.step()
        stack.after_step(model, step)
    return optimizer


def test_gate_by_hand():
    # alpha = 0, u = 1/2: s = 1/2, z = 1/2 * 3 - 1.5 = 0; dz = 3 / 4 only strictly inside (0, 1).
    z, dz = gate(torch.tensor([0.0, math.log(3), 9.0]).double(), torch.full((3,), 0.5).double(), -1.5, 1.5)
    assert z.tolist() == pytest.approx([0.0, 0.75, 1.0])
    assert dz.tolist() == pytest.approx([0.0, 3 * 0.75 * 0.25, 0.0])
    u = uniform("gates", 0, 200_000)
    z = gate(torch.full((200_000,), 5.0).double(), u, -1.5, 1.5)[0]
    assert float((z > 0).double().mean()) == pytest.approx(0.9933, abs=5e-4)
    assert float((z == 1).double().mean()) == pytest.approx(0.9674, abs=1.5e-3)


@pytest.mark.parametrize("mode", ["structured", "unstructured"])
def test_expected_norm_equals_monte_carlo(mode: str):
    model = tiny_model("llama").double()
    wrapper, _ = pruned(model, mode=mode, l0=1.0, scope="layers.0.mlp.up")
    randomise(model)
    (hook,) = gates(model).values()
    want = float(wrapper.penalty(model).detach())
    draws = 400
    counts = torch.tensor([float((hook.difference(str(i)) != 0).sum()) for i in range(draws)])
    assert want == pytest.approx(float(counts.mean()), abs=5 * float(counts.std()) / draws**0.5 + 1e-9)


def test_code_penalty_adds_the_group_once():
    model = tiny_model("llama").double()
    wrapper, _ = pruned(model, l0=1.0, scope="layers.0.mlp.up", penalty_form="code", low=-1.0, high=2.0)
    randomise(model)
    (hook,) = gates(model).values()
    shift = math.log(0.5)
    want = torch.sigmoid(hook.alpha - shift).sum() + torch.sigmoid(hook.group - shift)
    assert float(wrapper.penalty(model)) == pytest.approx(float(want), rel=1e-12)


@pytest.mark.parity("diff_pruning", "autograd through the gates, float64")
@pytest.mark.parametrize("mode", ["structured", "unstructured"])
def test_gradients_equal_autograd_in_float64(mode: str):
    model = tiny_model("llama", tie_word_embeddings=True).double()
    _, stack = pruned(model, mode=mode, l0=1e-3)
    randomise(model)
    stack.before_step(model, 3)
    probe = language_probe(model)
    batch = next(probe.batches(1))
    (probe.loss(batch) + stack.penalty(model)).backward()
    got = {n: {k: p.grad for k, p in hook.named_parameters()} for n, hook in gates(model).items()}
    plain = tiny_model("llama", tie_word_embeddings=True).double()
    leaves, total, replaced = {}, 0.0, {}
    for name, hook in gates(model).items():
        leaf = {k: p.detach().clone().requires_grad_(True) for k, p in hook.named_parameters()}
        u = uniform(f"0:3:{name}", 0, hook.w.numel()).view_as(hook.w)
        z = (torch.sigmoid(leaf["alpha"] + torch.logit(u)) * 3 - 1.5).clamp(0, 1)
        norm = torch.sigmoid(leaf["alpha"]).sum()
        if mode == "structured":
            ug = uniform(f"0:3:{name}:group", 0, 1)[0]
            z = z * (torch.sigmoid(leaf["group"] + torch.logit(ug)) * 3 - 1.5).clamp(0, 1)
            norm = norm * torch.sigmoid(leaf["group"])
        replaced[name] = dict(plain.named_parameters())[name].detach() + z * leaf["w"]
        leaves[name], total = leaf, total + 1e-3 * norm
    torch.func.functional_call(Step(plain), {f"model.{k}": v for k, v in replaced.items()}, (batch, total))
    for name, leaf in leaves.items():
        for key, value in leaf.items():
            want = torch.zeros_like(value) if value.grad is None else value.grad
            torch.testing.assert_close(got[name][key], want, rtol=1e-5, atol=1e-8)


class Step(nn.Module):
    """The probe's loss and its backward pass as a module, so that its tensors can be replaced for both."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Any, penalty: torch.Tensor) -> None:
        (language_probe(self.model).loss(batch) + penalty).backward()


def test_starts_at_the_base_and_evaluates_without_noise():
    model = tiny_model("llama")
    probe = language_probe(model)
    batch = next(probe.batches(1))
    want = probe.loss(batch).detach()
    _, stack = pruned(model)
    torch.testing.assert_close(probe.loss(batch), want, rtol=1e-6, atol=1e-6)
    randomise(model)
    with torch.no_grad():
        first = probe.loss(batch)
        stack.before_step(model, 1)
        assert torch.equal(first, probe.loss(batch))
    noisy = [stack.before_step(model, step) or float(probe.loss(batch).detach()) for step in (1, 2, 1)]
    assert noisy[0] == noisy[2] != noisy[1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gates_are_formed_once_a_step_whatever_the_micro_batches(monkeypatch: pytest.MonkeyPatch, checkpointing: bool):
    """Drawn and stretched once for each tensor, tied ones too; the next step forms them again."""
    from llmrecipe.methods.selective._engines import hard_concrete

    model = tiny_model("llama", tie_word_embeddings=True).train()
    _, stack = pruned(model, mode="unstructured")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    drawn: list[str] = []

    def counted(address: str, first: int, count: int, device: Any = None) -> torch.Tensor:
        drawn.append(f"{address}:{first}")
        return uniform(address, first, count, device)

    monkeypatch.setattr(hard_concrete, "uniform", counted)
    probe = language_probe(model)
    for step in range(2):
        stack.before_step(model, step)
        for batch in probe.batches(4, 1):
            probe.loss(batch).backward()
        stack.after_step(model, step)
        assert {address.rsplit(":", 1)[0] for address in drawn} >= {f"0:{step}:{name}" for name in gates(model)}
        assert len(drawn) == len(set(drawn)), "a draw was repeated"
        drawn.clear()


@pytest.mark.slow
@pytest.mark.parametrize(("micros", "most"), [(1, 2.0), (8, 1.4)])
def test_a_step_takes_at_most_twice_that_of_full_fine_tuning(micros: int, most: float):
    """CPU seconds: what depends on weights alone is no work of a micro-batch (1.6 where it is)."""
    from tests.benchmarks.weight_work import step, subject

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pair = {"full": subject([]), "diff_pruning": subject(["diff_pruning"])}
        times = {name: [step(*parts, micros, number) for number in range(4)] for name, parts in pair.items()}
    finally:
        torch.set_num_threads(threads)
    assert min(times["diff_pruning"][1:]) <= most * min(times["full"][1:]), times


def test_checkpointing_sees_the_same_gates():
    grads = []
    for checkpointing in (False, True):
        model = tiny_model("llama").double().train()
        pruned(model)
        randomise(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
        probe = language_probe(model)
        probe.loss(next(probe.batches(1))).backward()
        grads.append({n: p.w.grad for n, p in gates(model).items()})
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("adaptive", [True, False])
def test_phases_keep_exactly_k_of_the_largest_and_freeze_the_rest(adaptive: bool):
    model = tiny_model("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapper, stack = pruned(model, l0_steps=4, density=0.01, l0=1e-4, adaptive=adaptive)
    total = sum(p.numel() for p in before.values())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == (2 * total + len(before) if adaptive else total)
    run(model, stack, 4)
    assert wrapper.structure(model) == {"phase": "l0"}
    with pytest.raises(ModelError, match="not been pruned yet"):
        wrapper.merge(copy.deepcopy(model))
    differences = torch.cat([p.difference("0:prune").abs() for p in gates(model).values()])
    learned = torch.cat([p.w.detach().reshape(-1) for p in gates(model).values()])
    names = list(gates(model))
    assert stack.before_step(model, 4)
    k = int(0.01 * total)
    hooks = {hook.source: hook for _, _, hook in sparse_hooks(model, "diff")}
    kept = torch.zeros(total, dtype=torch.bool)
    offset, values = 0, []
    for name in names:
        if name in hooks:
            kept[offset + hooks[name].idx.long()] = True
            values.append(hooks[name].values.detach())
        offset += before[name].numel()
    assert int(kept.sum()) == k and differences[kept].min() >= differences[~kept].max()
    assert torch.equal(torch.cat(values), learned[kept])
    run(model, stack, 4, first=4)
    assert stack.penalty(model) == 0.0
    wrapper.merge(model)
    for name, old in before.items():
        changed = (dict(model.named_parameters())[name].reshape(-1) != old.reshape(-1)).nonzero().squeeze(1).tolist()
        assert set(changed) <= (set(hooks[name].idx.tolist()) if name in hooks else set())


@pytest.mark.parametrize("stop", [2, 6])
def test_resume_in_either_phase_is_bit_exact(stop: int):
    options: dict[str, Any] = {"l0_steps": 4, "density": 0.02, "l0": 1e-4}
    model = tiny_model("llama")
    wrapper, stack = pruned(model, **options)
    optimizer = run(model, stack, stop)
    structure, delta = wrapper.structure(model), {k: v.clone() for k, v in wrapper.delta(model).items()}
    again = tiny_model("llama")
    _, other = pruned(again, structure, **options)
    other.restore(again, delta)
    other.set_trainable(again)
    state = copy.deepcopy(optimizer.state_dict())
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names == [n for n, p in again.named_parameters() if p.requires_grad]
    scales = {n: g.lr_scale for g in other.groups(again) for n in g.names}
    twin = torch.optim.AdamW(
        [{"params": [p], "lr": 1e-3 * scales.get(n, 1.0)} for n, p in again.named_parameters() if p.requires_grad],
        weight_decay=0.1,
    )
    twin.load_state_dict(state)
    run(model, stack, 3, stop, optimizer)
    run(again, other, 3, stop, twin)
    a, b = stack.delta(model), other.delta(again)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_penalty_warms_up_and_scales_with_the_model():
    model = tiny_model("llama")
    total = sum(p.numel() for p in model.parameters())
    wrapper, stack = pruned(model, l0=1.0, l0_per_parameter=True, l0_warmup=4, mode="unstructured")
    full = 1 / (1 + math.exp(-5.0))
    for step, share in ((0, 0.25), (1, 0.5), (7, 1.0)):
        stack.before_step(model, step)
        assert float(wrapper.penalty(model)) == pytest.approx(share * full, rel=1e-4)
    assert total == dict(wrapper.describe(model))["gates alpha"]


def test_penalty_closes_gates():
    model = tiny_model("llama")
    _, stack = pruned(model, l0=10.0, l0_per_parameter=True, l0_steps=100)
    start = float(stack.penalty(model))
    run(model, stack, 8)
    assert float(stack.penalty(model)) < 0.2 * start
