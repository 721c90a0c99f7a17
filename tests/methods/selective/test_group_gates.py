"""Structured selection with learned gates: the expected L0 norm of groups, the phases, resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.forward_context import checkpoint_contexts
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.selective._engines.counter_rng import uniform
from llmrecipe.methods.selective._engines.hard_concrete import GroupGate
from llmrecipe.methods.selective._engines.sparse_method import base_weights, sparse_hooks
from llmrecipe.methods.selective._engines.weight_groups import GroupFamily, families
from llmrecipe.methods.selective.group_mask import GroupMask
from llmrecipe.models.hooks.hook import all_hooks
from tests.methods.probe import language_probe
from tests.methods.selective.test_diff_pruning import Step, run
from tests.tiny import tiny_model
from tests.trainings import curve, learned, resume, stop_after, train_recipe

KINDS = ["tensor", "row", "column", "head", "neuron", "layer"]


def gated(model: nn.Module, structure: dict[str, Any] | None = None, **options: Any) -> tuple[GroupMask, Stack]:
    stack = Stack([GroupMask(name="groups", hard_l0=True, **options)])
    stack.attach(model, {"groups": structure} if structure else None)
    stack.calibrate(model, language_probe(model))
    return stack.wrappers[0], stack  # type: ignore[return-value]


def gates(model: nn.Module) -> dict[str, GroupGate]:
    return {p.source: p for _, _, _, p in all_hooks(model, "groups") if isinstance(p, GroupGate)}


def logits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {p.family: p.alpha for p in gates(model).values() if p.alpha is not None}


def randomise(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for hook in gates(model).values():
            hook.w.normal_(std=0.05)
            if hook.alpha is not None:
                hook.alpha.normal_(std=1.0)


def spread(family: GroupFamily, z: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gate of every number of every tensor of a family, written group by group."""
    found = {}
    for member in family.members:
        full = torch.zeros(member.weight.shape, dtype=z.dtype)
        for group, index in enumerate(member.index):
            mask = torch.zeros_like(full)
            mask.index_fill_(full.dim() - 1 if member.layout == "columns" else 0, index, 1.0)
            full = full + mask * z[group]
        found[member.weight.name] = full
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_expected_norm_equals_monte_carlo(kind: str):
    model = tiny_model("gpt2").double()
    wrapper, _ = gated(model, group=kind, l0=1.0, density=0.6, low=-1.0, high=2.0)
    randomise(model)
    want = float(torch.as_tensor(wrapper.penalty(model)).detach())
    draws = 60
    counts = torch.tensor([sum(float((p.difference(str(i)) != 0).sum()) for p in gates(model).values()) for i in range(draws)])
    assert want == pytest.approx(float(counts.mean()), abs=5 * float(counts.std()) / draws**0.5)
    by_hand = sum(
        f.size * float(torch.sigmoid(logits(model)[f.name].detach() + torch.tensor(2.0).double().log()).sum())
        for f in families(model, kind)  # type: ignore[arg-type]
    )
    assert want == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parity("group_mask", "autograd through the gates, float64")
@pytest.mark.parametrize(("family", "kind"), [("gpt2", k) for k in KINDS] + [("phi3", "head"), ("llama", "tensor")])
def test_gradients_equal_autograd_in_float64(family: str, kind: str):
    shape = {"tie_word_embeddings": True} if family == "llama" else {}
    model, plain = tiny_model(family, **shape).double(), tiny_model(family, **shape).double()
    _, stack = gated(model, group=kind, l0=1e-3, density=0.6, l0_steps=9)
    randomise(model)
    stack.before_step(model, 3)
    probe = language_probe(model)
    batch = next(probe.batches(1))
    (probe.loss(batch) + stack.penalty(model)).backward()
    base, replaced, total = dict(plain.named_parameters()), {}, torch.zeros(()).double()
    leaves: dict[str, torch.Tensor] = {}
    for found in families(plain, kind):  # type: ignore[arg-type]
        alpha = leaves[found.name] = logits(model)[found.name].detach().clone().requires_grad_(True)
        u = uniform(f"0:3:{found.name}:group", 0, found.count)
        z = (torch.sigmoid(alpha + torch.logit(u)) * 3 - 1.5).clamp(0, 1)
        total = total + 1e-3 * found.size * torch.sigmoid(alpha).sum()
        for name, full in spread(found, z).items():
            w = leaves[f"w of {name}"] = gates(model)[name].w.detach().clone().requires_grad_(True)
            replaced[f"model.{name}"] = base[name].detach() + full * w
    torch.func.functional_call(Step(plain), replaced, (batch, total))
    got = {**logits(model), **{f"w of {n}": p.w for n, p in gates(model).items()}}
    assert got.keys() == leaves.keys()
    for key, leaf in leaves.items():
        torch.testing.assert_close(got[key].grad, leaf.grad, rtol=1e-6, atol=1e-10)
    assert any(float(leaf.grad.abs().max()) > 1e-6 for key, leaf in leaves.items() if key.startswith("w of"))


def test_starts_at_the_base_bit_for_bit():
    model = tiny_model("llama")
    probe = language_probe(model)
    batch = next(probe.batches(1))
    want = probe.loss(batch).detach()
    gated(model, group="neuron", density=0.2)
    assert torch.equal(probe.loss(batch).detach(), want)


def test_checkpointing_sees_the_same_gates_and_evaluation_sees_none_drawn():
    grads = []
    for checkpointing in (False, True):
        model = tiny_model("llama").double().train()
        _, stack = gated(model, group="head", density=0.5)
        randomise(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
        probe = language_probe(model)
        batch = next(probe.batches(1))
        probe.loss(batch).backward()
        grads.append({n: p.w.grad for n, p in gates(model).items()} | {n: a.grad for n, a in logits(model).items()})
        with torch.no_grad():
            first = probe.loss(batch)
            stack.before_step(model, 1)
            assert torch.equal(first, probe.loss(batch))
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "row", "column", "head", "neuron"])
@pytest.mark.parametrize("normalize", ["mean", "sum"])
def test_phases_take_the_groups_of_the_largest_difference_and_freeze_the_rest(kind: str, normalize: str):
    model = tiny_model("gpt2")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = families(model, kind)  # type: ignore[arg-type]
    total = sum(f.count * f.size for f in found)
    wrapper, stack = gated(model, group=kind, normalize=normalize, l0_steps=3, density=0.3, l0=1e-4)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == total + sum(f.count for f in found)
    run(model, stack, 3)
    assert wrapper.structure(model) == {"phase": "l0"}
    with pytest.raises(ModelError, match="not been pruned yet"):
        wrapper.merge(copy.deepcopy(model))
    hooks = gates(model)
    with torch.no_grad():
        for hook in hooks.values():
            # Open gates and heavy tails: more groups are open than fit, and another power of delta would pick others.
            hook.w.mul_(torch.randn_like(hook.w).pow(3))
            if hook.alpha is not None:
                hook.alpha.normal_(mean=2.0)
    learned = {n: p.w.detach().clone() for n, p in hooks.items()}
    scores: list[tuple[float, int, str, int]] = []
    for family in found:
        z = (
            torch.sigmoid(
                logits(model)[family.name].detach().double()
                + torch.logit(uniform(f"0:prune:{family.name}:group", 0, family.count).double())
            )
            * 3
            - 1.5
        ).clamp(0, 1)
        for group in range(family.count):
            one = spread(family, torch.eye(family.count).double()[group])
            value = sum(float((one[n] * z[group] * learned[n].double()).square().sum()) for n in one)
            scores.append((value / (family.size if normalize == "mean" else 1), family.size, family.name, group))
    left, taken = int(0.3 * total), set()
    for _, size, name, group in sorted(scores, key=lambda s: -s[0]):
        if size <= left:
            left -= size
            taken.add((name, group))
    want: dict[str, torch.Tensor] = {}
    for family in found:
        keep = torch.tensor([float((family.name, g) in taken) for g in range(family.count)])
        want |= {n: m.bool() for n, m in spread(family, keep).items()}

    assert stack.before_step(model, 3)
    kept = {hook.source: hook for _, _, hook in sparse_hooks(model, "groups")}
    assert sum(p.values.numel() for p in kept.values()) == int(0.3 * total) - left == sum(int(m.sum()) for m in want.values())
    for name, hook in kept.items():
        picked = learned[name][want[name]]
        assert torch.equal(hook.values.detach().reshape(-1).sort()[0], picked.sort()[0])
    assert stack.penalty(model) == 0.0
    run(model, stack, 3, first=3)
    wrapper.merge(model)
    moved = 0
    for name, old in before.items():
        changed = dict(model.named_parameters())[name] != old
        assert not (changed & ~want.get(name, torch.zeros_like(changed))).any()
        moved += int(changed.sum())
    assert moved > 0.5 * (int(0.3 * total) - left)


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_resume_before_at_and_after_the_selection_is_bit_exact(stop: int):
    options: dict[str, Any] = {"group": "neuron", "l0_steps": 4, "density": 0.1, "l0": 1e-4}
    model = tiny_model("llama")
    wrapper, stack = gated(model, **options)
    optimizer = run(model, stack, stop)
    structure, delta = wrapper.structure(model), {k: v.clone() for k, v in wrapper.delta(model).items()}
    assert structure["phase"] == ("fixed" if stop > 4 else "l0")
    again = tiny_model("llama")
    other = Stack([GroupMask(name="groups", hard_l0=True, **options)])
    other.attach(again, {"groups": structure})
    other.wrappers[0].restore(again, delta)
    other.set_trainable(again)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, p in again.named_parameters() if p.requires_grad
    ]
    scales = {n: g.lr_scale for g in other.groups(again) for n in g.names}
    twin = torch.optim.AdamW(
        [{"params": [p], "lr": 1e-3 * scales.get(n, 1.0)} for n, p in again.named_parameters() if p.requires_grad],
        weight_decay=0.1,
    )
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(model, stack, 3, stop, optimizer)
    run(again, other, 3, stop, twin)
    a, b = stack.delta(model), other.delta(again)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.slow
def test_interrupted_runs_resume_to_the_bit(tmp_path: Path):
    gate = [f"stack.group_mask.{o}" for o in ("hard_l0=true", "l0_steps=3", "l0=0.1", "l0_per_parameter=true")]
    common = [*gate, "epochs=null", "steps=6", "batch.size=4", "eval.at_start=false", "eval.load_best=false"]
    train_recipe(tmp_path / "whole", "group_mask", *common)
    for stop in (2, 3, 4):
        stop_after(stop, tmp_path / str(stop), "group_mask", *common)
        resume(tmp_path / str(stop))
        assert curve(tmp_path / str(stop)) == curve(tmp_path / "whole")
        want, got = learned(tmp_path / "whole"), learned(tmp_path / str(stop))
        assert want.keys() == got.keys() and all(torch.equal(want[n], got[n]) for n in want)


def test_penalty_closes_gates_and_scales_with_the_model():
    model = tiny_model("llama")
    wrapper, stack = gated(model, group="row", density=0.1, l0=10.0, l0_per_parameter=True, l0_warmup=2, l0_steps=100)
    stack.before_step(model, 0)
    full = float(torch.sigmoid(torch.tensor(5.0)))
    assert float(torch.as_tensor(wrapper.penalty(model)).detach()) == pytest.approx(5.0 * full, rel=1e-5)
    stack.before_step(model, 1)
    assert float(torch.as_tensor(wrapper.penalty(model)).detach()) == pytest.approx(10.0 * full, rel=1e-5)
    run(model, stack, 8)
    assert float(torch.as_tensor(stack.penalty(model)).detach()) < 2.0
    assert dict(wrapper.describe(model))["gates alpha"] == sum(f.count for f in families(model, "row"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l0_steps": 5}, r"stack.groups.l0_steps: 5 has no effect: only hard_l0: true reads it"),
        ({"alpha_init": 1.0}, r"stack.groups.alpha_init: 1.0 has no effect"),
        ({"hard_l0": True, "score": "taylor"}, r"stack.groups.score: taylor has no effect: hard_l0: true chooses"),
        ({"hard_l0": True, "layer_groups": 2}, r"stack.groups.layer_groups: 2 has no effect"),
    ],
)
def test_options_the_choice_does_not_read_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        Stack([GroupMask(name="groups", density=0.2, **options)]).attach(tiny_model("llama"))


def test_only_learned_choices_carry_a_penalty():
    assert not GroupMask(name="groups").penalizes() and GroupMask(name="groups", hard_l0=True).penalizes()
    model = tiny_model("llama")
    stack = Stack([GroupMask(name="groups", density=0.2)])
    stack.attach(model)
    assert stack.penalty(model) == 0.0 and not gates(model) and base_weights(model)
