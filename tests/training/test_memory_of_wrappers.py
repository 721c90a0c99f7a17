"""What each registered wrapper says it costs, on the meta device, against what is measured on the same model."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llmrecipe.core import registry
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.methods._base.stack import Stack
from llmrecipe.optim.optimizer import build_optimizer, parameter_groups
from llmrecipe.training.memory_estimate import delta_bytes, estimate_memory, optimizer_bytes
from tests.contract import MIXTURES
from tests.methods.additive.harness import model_of
from tests.methods.formulas import FORMULAS, shape
from tests.methods.kinds import BASES, CHANGES, Cell, put, wrapper_of

BOUNDED = ("group_mask", "smt", "spt")
"""Kinds whose groups, blocks or modules fill a budget up to the next one that does not fit."""
DENSE = [k for k in CHANGES if k not in MIXTURES]
ADAMW = registry.load_class("optim", "adamw")()


def skeleton(kind: str, family: str) -> tuple[torch.nn.Module, Stack]:
    """As `check` builds it."""
    with torch.device("meta"):
        model = model_of(family)
    stack = Stack([wrapper_of(kind)])
    stack.attach(model)
    return model, stack


def costs(stack: Stack, model: torch.nn.Module) -> Counter[str]:
    """What the wrappers of a stack cost together."""
    total: Counter[str] = Counter()
    for wrapper in stack:
        total.update(wrapper.memory(model))
    return total


def stepped(made: Cell) -> torch.optim.Optimizer:
    """An optimizer that has made one step with a gradient in every trained tensor."""
    optimizer = build_optimizer(ADAMW, parameter_groups(made.model, ADAMW, made.stack.groups(made.model)))
    for parameter in made.trained().values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("family", ["llama", "bert", pytest.param("t5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", DENSE)
def test_counts_and_bytes_are_known_before_a_weight_is_read(kind: str, family: str, tmp_path) -> None:
    model, planned = skeleton(kind, family)
    facts = costs(planned, model)
    made = put(model_of(family), wrapper_of(kind))
    trained = sum(p.numel() for p in made.trained().values())
    optimizer = stepped(made)
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in made.trained().values())
    # AdamW counts its steps in a number of its own for each tensor.
    state = optimizer_bytes(optimizer) - 4 * len(made.trained())
    saved = {n: t.contiguous().clone() for n, t in made.stack.delta(made.model).items()}
    save_file(saved, str(tmp_path / "delta.safetensors"))
    with safe_open(str(tmp_path / "delta.safetensors"), "pt") as file:
        written = sum(file.get_tensor(n).nbytes for n in saved)
    now = costs(made.stack, made.model)
    assert (now["trainable"], now["gradient_bytes"], now["optimizer_bytes"]) == (trained, gradients, state)
    assert delta_bytes(made.model, made.stack) == written
    if kind in BOUNDED:
        assert 0 < trained <= facts["trainable"] and written <= delta_bytes(model, planned)
        return
    assert (facts["trainable"], facts["gradient_bytes"], facts["optimizer_bytes"]) == (trained, gradients, state)
    assert delta_bytes(model, planned) == written
    if all(type(wrapper).calibrate is Wrapper.calibrate for wrapper in planned):
        guess = estimate_memory(model, planned, ADAMW, tokens=64)
        assert (guess.trained, guess.gradients) == (trained, gradients)
        assert guess.optimizer == optimizer_bytes(optimizer)


@pytest.mark.parametrize("kind", FORMULAS)
def test_what_trains_is_the_closed_form(kind: str) -> None:
    model = model_of("llama")
    numbers = shape(model)
    made = put(model, wrapper_of(kind))
    assert sum(p.numel() for p in made.trained().values()) == FORMULAS[kind][1](wrapper_of(kind), numbers)


@pytest.mark.parametrize("kind", BASES)
def test_the_weight_of_a_quantized_base_is_known_before_it_is_read(kind: str) -> None:
    from llmrecipe.methods._engines.quantized import quantized

    model, planned = skeleton(kind, "llama")
    made = put(model_of("llama"), wrapper_of(kind))
    stored = 0
    for _, module in quantized(made.model):
        weight = module.weight
        if kind == "int8":
            # The first forward pass moves the codes from the weight into the state of its module.
            held = weight if weight.CB is not None else module.state
            stored += held.CB.nbytes + held.SCB.nbytes
            continue
        inner = weight.quant_state.state2
        tensors = [weight.data, weight.quant_state.absmax, weight.quant_state.code]
        tensors += [inner.absmax, inner.code, weight.quant_state.offset] if inner is not None else []
        stored += sum(t.nbytes for t in tensors)
    facts = planned.wrappers[0].memory(model)
    assert facts["base_bytes"] == made.stack.wrappers[0].memory(made.model)["base_bytes"] == stored > 0
