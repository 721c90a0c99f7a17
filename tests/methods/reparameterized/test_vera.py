"""VeRA: the formula, parity with PEFT, one pair of matrices for the whole model, merging, what a delta holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.reparameterized.vera import Projections, ScaledProjection, Vera
from llmrecipe.models.hooks.hook import all_hooks
from tests.interop.saved_runs import fill
from tests.recipes.learning import LISTS
from tests.tiny import tiny_model
from tests.trainings import events, learned, train_recipe

IDS = torch.tensor([[5, 9, 3, 60, 7, 7, 2]])
TARGET = "attn.q|v + mlp.down"


def adapted(seed: int = 0, **options: Any) -> tuple[nn.Module, Stack]:
    model = tiny_model()
    stack = Stack([Vera(name="vera", r=6, target=TARGET, seed=seed, **options)])
    stack.attach(model)
    stack.set_trainable(model)
    return model, stack


def hooks(model: nn.Module) -> dict[str, ScaledProjection]:
    return {path: hook for path, _, _, hook in all_hooks(model) if isinstance(hook, ScaledProjection)}


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(input_ids=IDS).logits[0, :-1], IDS[0, 1:])


@pytest.mark.parity("vera", "formula, float64")
@pytest.mark.parametrize("rows", [None, [4, 0, 2]])
def test_output_and_gradients_follow_the_formula(rows: list[int] | None) -> None:
    """y + b * (B (d * (A x))) with the first columns of A and rows of B, in float64."""
    torch.manual_seed(0)
    shared = Projections(4, 8, 7, seed=3).double()
    index = None if rows is None else torch.tensor(rows)
    hook = ScaledProjection(shared, 6, 3 if rows else 5, 0.1, 0.0, index).double()
    nn.init.normal_(hook.lambda_b)
    nn.init.normal_(hook.lambda_d)
    x, y = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    b, d = (t.detach().clone().requires_grad_() for t in (hook.lambda_b, hook.lambda_d))
    change = b * ((d * (x @ shared.A[:, :6].t())) @ shared.B[: len(b)].t())
    wanted = y.clone()
    if rows is None:
        wanted = wanted + change
    else:
        for place, row in enumerate(rows):
            wanted = wanted + nn.functional.pad(change[..., place : place + 1], (row, 4 - row))
    got = hook.after(x, y)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    wanted.square().sum().backward()
    got.square().sum().backward()
    torch.testing.assert_close(hook.lambda_b.grad, b.grad, atol=1e-10, rtol=0)
    torch.testing.assert_close(hook.lambda_d.grad, d.grad, atol=1e-10, rtol=0)


@pytest.mark.slow
@pytest.mark.parity("vera", "PEFT VeraConfig")
def test_loss_gradients_and_five_steps_equal_peft() -> None:
    """From equal seeds both draw the same A and B."""
    from peft import VeraConfig, get_peft_model

    model, _ = adapted()
    fill(model)
    names = ["q_proj", "v_proj", "down_proj"]
    theirs = get_peft_model(tiny_model(), VeraConfig(r=6, target_modules=names, projection_prng_key=0, task_type="CAUSAL_LM"))
    pairs = []
    for name, module in theirs.named_modules():
        if hasattr(module, "vera_lambda_b"):
            own = hooks(model)[name.removeprefix("base_model.model.")]
            module.vera_lambda_b["default"].data.copy_(own.lambda_b.data)
            module.vera_lambda_d["default"].data.copy_(own.lambda_d.data)
            torch.testing.assert_close(own.shared[0].A, module.vera_A["default"], atol=0, rtol=0)
            torch.testing.assert_close(own.shared[0].B, module.vera_B["default"], atol=0, rtol=0)
            pairs += [(own.lambda_b, module.vera_lambda_b["default"]), (own.lambda_d, module.vera_lambda_d["default"])]
    assert len(pairs) == 12
    optimizers = [torch.optim.SGD([pair[side] for pair in pairs], lr=0.5) for side in (0, 1)]
    for _ in range(5):
        losses = [loss_of(side) for side in (model, theirs)]
        torch.testing.assert_close(losses[0], losses[1], atol=1e-6, rtol=1e-5)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for own, other in pairs:
            torch.testing.assert_close(own.grad, other.grad, atol=1e-6, rtol=1e-4)
        for optimizer in optimizers:
            optimizer.step()
    for own, other in pairs:
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-4)


def test_what_trains_and_what_is_kept() -> None:
    """r + out numbers a site; A and B are one pair, neither trained nor in the delta."""
    model, stack = adapted()
    found = hooks(model)
    assert len({id(hook.shared[0]) for hook in found.values()}) == 1
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == sum(6 + hook.lambda_b.numel() for hook in found.values())
    assert stack.delta(model).keys() == trained.keys()
    held = next(iter(stack)).memory(model)
    widest = found["model.layers.0.mlp.down_proj"]
    assert held["trainable"] == sum(trained.values()) and widest.width_in == max(h.width_in for h in found.values())
    assert held["state_bytes"] == 4 * 6 * (widest.width_in + max(h.lambda_b.numel() for h in found.values()))


def test_the_backward_pass_keeps_nothing_of_width_in_or_out() -> None:
    """Of 50 tokens, autograd holds A x (50, r) twice, and weights."""
    shared = Projections(4, 32, 16, seed=0)
    hook = ScaledProjection(shared, 32, 16, 0.1, 0.0, None)
    x, y = torch.randn(50, 32), torch.randn(50, 16)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        hook.after(x, y)
    assert {shape for shape in kept if 50 in shape} == {(50, 4)}


def test_another_draw_is_refused() -> None:
    """A saved digest stands for the matrices the vectors were trained with."""
    model, stack = adapted(seed=1)
    saved = stack.structures(model)
    Stack([Vera(name="vera", r=6, target=TARGET, seed=1)]).attach(tiny_model(), saved)
    with pytest.raises(ModelError, match=r"stack\.vera: seed 2 gives other matrices A and B"):
        Stack([Vera(name="vera", r=6, target=TARGET, seed=2)]).attach(tiny_model(), saved)


def test_a_run_saves_its_vectors_alone(tmp_path: Path) -> None:
    run = train_recipe(tmp_path / "run", "vera", "steps=2", "epochs=null", "batch.size=4", "stack.vera.r=8")
    tensors = learned(tmp_path / "run")
    assert {name.rpartition(".")[2] for name in tensors} == {"lambda_b", "lambda_d"}
    assert all(torch.equal(value, dict(run.model.named_parameters())[name]) for name, value in tensors.items())


@pytest.mark.slow
def test_the_recipe_learns_and_its_control_does_not(tmp_path: Path) -> None:
    """The control trains on answers that belong to other questions."""
    train_recipe(tmp_path / "run", "vera")
    assert events(tmp_path / "run", "evaluation")[-1]["eval/loss"] <= 0.5
    train_recipe(tmp_path / "control", "vera", *LISTS(tmp_path / "data"))
    assert events(tmp_path / "control", "evaluation")[-1]["eval/loss"] >= 0.9
