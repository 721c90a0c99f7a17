"""A hybrid against the stack it says it stands for, written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from llmrecipe.methods._base.method import Wrapper
from llmrecipe.methods._base.stack import Stack
from llmrecipe.recipe.compose import compose, to_yaml
from llmrecipe.runs.delta import build_wrapper
from tests.methods.additive.harness import fill, logits, model_of
from tests.trainings import curve, learned, train_recipe


def on(family: str, wrappers: list[Wrapper]) -> tuple[nn.Module, Stack]:
    """A stack on a tiny model, with the start it always has."""
    model, stack = model_of(family), Stack(wrappers)
    torch.manual_seed(1)
    stack.attach(model)
    return model, stack


def printed(stack: Stack) -> dict[str, Any]:
    """What a stack prints of its hybrids, read as YAML."""
    return yaml.safe_load("\n".join(line for line in stack.written_out() if line.startswith("  ")))


def by_hand(text: str) -> list[Wrapper]:
    """The wrappers of a piece of YAML, as a recipe's `stack` gives them."""
    return [build_wrapper(name, options) for name, options in yaml.safe_load(text).items()]


def results(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of each trained tensor."""
    out = logits(model)
    out.square().mean().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def stands_for(family: str, hybrid: Wrapper, text: str) -> nn.Module:
    """The printed stack is this one, and both have the same tensors, logits and gradients to the bit; returns the hybrid's."""
    ours, stack = on(family, [hybrid])
    assert printed(stack) == yaml.safe_load(text)
    theirs, other = on(family, by_hand(text))
    assert not other.written_out()
    left, right = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs))
    assert left and list(left) == list(right) and all(torch.equal(p, right[n]) for n, p in left.items())
    for model in (ours, theirs):
        fill(model)
    (a, grads), (b, wanted) = results(ours), results(theirs)
    assert torch.equal(a, b) and grads.keys() == wanted.keys() == left.keys()
    assert all(torch.equal(g, wanted[n]) and bool(g.any()) for n, g in grads.items())
    return ours


def trains_alike(folder: Path, recipe: str, text: str, *words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of a hybrid prints this stack; a run of the stack itself makes the same steps and leaves the same tensors."""
    more = [*words, "steps=3", "eval.at_start=false", "eval.batches=1"]
    train_recipe(folder / "hybrid", recipe, *more)
    shown = capsys.readouterr().out
    stack = yaml.safe_load(text)
    assert all(f"  {name}: {{kind: {options['kind']}" in shown for name, options in stack.items())
    plain = folder / "written.yaml"
    plain.write_text(to_yaml({**compose(recipe).mapping, "stack": stack}), encoding="utf-8")
    train_recipe(folder / "written", str(plain), *more)
    assert curve(folder / "hybrid") == curve(folder / "written")
    ours, theirs = learned(folder / "hybrid"), learned(folder / "written")
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())
