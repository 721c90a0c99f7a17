"""Replaced tensors that the micro-batches of a step share."""

from __future__ import annotations

import contextlib
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core.forward_context import checkpoint_contexts
from llmrecipe.data.collate import Batch
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._base.update_rule import backprop
from llmrecipe.methods.selective._engines.hard_concrete import DiffGate, GroupGate
from llmrecipe.methods.selective.diff_pruning import DiffPruning
from llmrecipe.methods.selective.group_mask import GroupMask
from llmrecipe.models.hooks.hook import Hook
from llmrecipe.models.hooks.host import add_hook
from llmrecipe.models.hooks.shared_weights import shared_weights
from llmrecipe.objectives.finetuning.sft import Sft
from tests.methods.probe import language_probe, token_rows
from tests.tiny import roles_for, tiny_model

METHODS: dict[str, Any] = {
    "structured": lambda: DiffPruning(name="own", l0=1e-3),
    "unstructured": lambda: DiffPruning(name="own", l0=1e-3, mode="unstructured"),
    "no gates": lambda: DiffPruning(name="own", adaptive=False),
    "groups": lambda: GroupMask(name="own", hard_l0=True, l0=1e-3, density=0.5),
}


def subject(wrapper: Wrapper) -> tuple[Any, Stack]:
    """A float64 model whose embedding is its output head too, with a stack that has moved away from the base."""
    model = tiny_model("llama", tie_word_embeddings=True).double().train()
    stack = Stack([wrapper])
    stack.attach(model)
    stack.calibrate(model, language_probe(model))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    stack.before_step(model, 3)
    return model, stack


def batches(roles: Any, counts: list[int]) -> list[Batch]:
    rows, ends = token_rows(sum(counts)), [sum(counts[: i + 1]) for i in range(len(counts))]
    return [Sft().collate(rows[end - count : end], roles) for end, count in zip(ends, counts, strict=True)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def updated(model: Any, stack: Stack, counts: list[int]) -> dict[str, Tensor]:
    """The gradients of a step by the loop's own rule."""
    objective, roles = Sft(), roles_for(model, stack)
    one: Any = SimpleNamespace(
        world=1,
        passes=int,
        sync=lambda *_: contextlib.nullcontext(),
        sum=lambda t: t,
        maximum=lambda t: t,
    )
    still = SimpleNamespace(step=lambda: None)
    context: Any = SimpleNamespace(
        step=3, model=model, stack=stack, objective=objective, roles=roles, runtime=one, optimizer=still, clip=lambda: 1.0,
        weight=lambda micros: sum(objective.weight(m) for m in micros), late=False,
    )  # fmt: skip
    backprop(context, batches(roles, counts))
    return gradients(model)


def summed(model: Any, stack: Stack, counts: list[int]) -> dict[str, Tensor]:
    """The same, each W' formed again in every micro-batch."""
    objective, roles = Sft(), roles_for(model, stack)
    micros = batches(roles, counts)
    weight = sum(objective.weight(m) for m in micros)
    for micro in micros:
        (objective.loss(micro, roles).total / weight).backward()
    penalty = stack.penalty(model)
    if isinstance(penalty, Tensor):
        penalty.backward()
    return gradients(model)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("counts", [[3, 2], [2, 3, 1, 2]], ids=str)
def test_gradients_equal_those_of_every_micro_batch_in_float64(name: str, counts: list[int], monkeypatch: pytest.MonkeyPatch):
    want = summed(*subject(METHODS[name]()), counts)
    formed: Counter[str] = Counter()

    def count(cls: Any) -> None:
        weight = cls.weight

        def counted(self: Any, value: Tensor) -> Tensor:
            formed[self.source] += 1
            return weight(self, value)

        monkeypatch.setattr(cls, "weight", counted)

    count(DiffGate)
    count(GroupGate)
    model, stack = subject(METHODS[name]())
    got = updated(model, stack, counts)
    assert formed and set(formed.values()) == {1}, "a tensor was formed again in the step"
    assert got.keys() == want.keys() and len(got) > 10
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("name", ["structured", "groups"])
def test_activation_checkpointing_recomputes_with_the_shared_tensors(name: str):
    want = summed(*subject(METHODS[name]()), [2, 1, 2])
    model, stack = subject(METHODS[name]())
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    got = updated(model, stack, [2, 1, 2])
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-11, atol=1e-15)


class Doubled(Hook):
    """W + w W, with how often it was formed."""

    once_a_step = True

    def __init__(self, value: float, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(value, dtype=dtype))
        self.calls = 0

    def weight(self, value: Tensor) -> Tensor:
        self.calls += 1
        return value + (self.w * value.to(self.w.dtype)).to(value.dtype)


def hosts(*values: float, dtype: torch.dtype = torch.float32) -> tuple[nn.ModuleDict, list[Doubled]]:
    """Frozen layers y = W x with W = (value), each under a hook."""
    model, hooks = nn.ModuleDict(), []
    for index, value in enumerate(values):
        layer = nn.Linear(1, 1, bias=False, dtype=dtype).requires_grad_(False)
        layer.weight.data.fill_(value)
        model[str(index)] = layer
        hooks.append(Doubled(0.5, torch.promote_types(dtype, torch.float32)))
        add_hook(layer, "own", hooks[-1], "own")
    return model, hooks


def test_a_layer_that_the_last_micro_batch_leaves_out_keeps_its_gradient():
    """y = (1 + w) W x, dy/dw = W x: 3 * (2 + 4) for the first layer, 5 * (2 + 1) for the second, 7 * 1 for the third."""
    model, hooks = hosts(3.0, 5.0, 7.0)
    with shared_weights(model, 3) as finish:
        for inputs in ({"0": 2.0, "1": 2.0}, {"0": 4.0}, {"1": 1.0, "2": 1.0}):
            sum(model[key](torch.tensor([x])).sum() for key, x in inputs.items()).backward()  # type: ignore[union-attr]
            finish()
    assert [float(hook.w.grad) for hook in hooks] == [18.0, 15.0, 7.0]  # type: ignore[arg-type]
    assert [hook.calls for hook in hooks] == [1, 1, 1]
    assert all(hook.sharing is None for hook in hooks)


def test_gradients_of_16_bit_weights_are_summed_in_float32():
    """256 + 1 + 1 is 256 where each sum is rounded to bfloat16."""
    model, (hook,) = hosts(1.0, dtype=torch.bfloat16)
    with shared_weights(model, 4) as finish:
        for x in (256.0, 1.0, 1.0, 0.0):
            model["0"](torch.tensor([x], dtype=torch.bfloat16)).sum().backward()
            finish()
    assert float(hook.w.grad) == 258.0 and hook.w.grad.dtype == torch.float32  # type: ignore[arg-type,union-attr]


def test_what_a_call_alone_decides_is_formed_in_that_call():
    """Without gradients, of a tensor that trains, and above another change of the tensor; one micro-batch shares nothing."""
    model, (hook,) = hosts(3.0)
    with shared_weights(model, 2):
        with torch.no_grad():
            model["0"](torch.ones(1)), model["0"](torch.ones(1))
        assert hook.calls == 2
        model["0"].weight.requires_grad_(True)
        for _ in range(2):
            model["0"](torch.ones(1)).sum().backward()
        assert hook.calls == 4 and float(model["0"].weight.grad) == 3.0  # type: ignore[arg-type]
        model["0"].weight.requires_grad_(False)
        add_hook(model["0"], "other", Doubled(1.0), "other")
        for _ in range(2):
            model["0"](torch.ones(1)).sum().backward()
        assert hook.calls == 6
    with shared_weights(model, 1):
        assert hook.sharing is None
