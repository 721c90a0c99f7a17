"""DyLoRA: the formula at every rank, which ranks learn, truncation, strict freezing, the rank of an export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from llmrecipe.core.errors import RecipeError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods.reparameterized.dylora import Dylora, NestedLowRank
from llmrecipe.models.hooks.hook import all_hooks
from tests.interop.saved_runs import base_folder, fill, saved_run
from tests.tiny import tiny_model

IDS = torch.tensor([[5, 9, 3, 60, 7, 7, 2]])


def adapted(**options: object) -> tuple[nn.Module, Stack, Dylora]:
    model = tiny_model()
    wrapper = Dylora(name="dylora", r=4, alpha=6.0, **options)
    stack = Stack([wrapper])
    stack.attach(model)
    fill(model)
    return model, stack, wrapper


def hooks(model: nn.Module) -> list[NestedLowRank]:
    return [hook for _, _, _, hook in all_hooks(model)]


def loss_of(model: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(model(input_ids=IDS).logits[0, :-1], IDS[0, 1:])


@pytest.mark.parity("dylora", "formula, float64")
@pytest.mark.parametrize("b", [1, 2, 3, 4])
@pytest.mark.parametrize("update", ["frozen", "full"])
def test_output_and_gradients_follow_the_formula_at_every_rank(b: int, update: str) -> None:
    """Against y + (alpha / b) B[:, :b] A[:b] x written out in float64, earlier ranks detached where frozen."""
    _, _, wrapper = adapted(update=update)
    torch.manual_seed(0)
    hook = NestedLowRank(6, 5, 4, 6.0, 0.0, None).double()
    nn.init.normal_(hook.A)
    nn.init.normal_(hook.B)
    hook.use(b, wrapper.learning(b))
    x, y = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    A, B = hook.A.detach().clone().requires_grad_(), hook.B.detach().clone().requires_grad_()
    cut_A, cut_B = A[:b], B[:, :b]
    if update == "frozen":
        cut_A, cut_B = torch.cat([cut_A[:-1].detach(), cut_A[-1:]]), torch.cat([cut_B[:, :-1].detach(), cut_B[:, -1:]], 1)
    wanted = y + 6.0 / b * x @ cut_A.t() @ cut_B.t()
    got = hook.after(x, y)
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)
    wanted.square().sum().backward()
    got.square().sum().backward()
    torch.testing.assert_close(hook.A.grad, A.grad, atol=1e-10, rtol=0)
    torch.testing.assert_close(hook.B.grad, B.grad, atol=1e-10, rtol=0)
    moved = hook.A.grad.abs().sum(1) > 0
    assert moved.tolist() == [(j == b - 1 if update == "frozen" else j < b) for j in range(4)]


def test_a_step_has_one_rank_for_all_modules_from_seed_and_step_alone() -> None:
    model, stack, wrapper = adapted()
    seen = []
    for step in range(40):
        stack.before_step(model, step)
        assert {p.b for p in hooks(model)} == {wrapper.draw(step)}
        seen.append(wrapper.draw(step))
        stack.after_step(model, step)
        assert {p.b for p in hooks(model)} == {4}
    assert set(seen) == {1, 2, 3, 4}
    assert seen != [Dylora(name="dylora", r=4, seed=1).draw(s) for s in range(40)]
    low = [Dylora(name="dylora", r=4, distribution="geometric", geometric_p=0.9).draw(s) for s in range(200)]
    assert low.count(1) > 160


@pytest.mark.parametrize(
    ("r", "r_min", "granularity", "blocks"),
    [
        (8, 1, 4, [range(0, 4), range(4, 8)]),
        (9, 1, 3, [range(0, 3), range(3, 6), range(6, 9)]),
        (3, 1, 1, [range(0, 1), range(1, 2), range(2, 3)]),
        (12, 5, 3, [range(0, 6), range(6, 9), range(9, 12)]),
        (8, 8, 2, [range(0, 8)]),
    ],
)
def test_blocks_have_the_size_they_state(r: int, r_min: int, granularity: int, blocks: list[range]) -> None:
    method = Dylora(name="dylora", r=r, r_min=r_min, granularity=granularity)
    assert [method.learning(b) for b in method.choices()] == blocks
    assert {method.draw(step) for step in range(200)} == {block.stop for block in blocks}


def test_blocks_that_would_differ_in_size_are_refused_for_a_new_run_only() -> None:
    method = Dylora(name="dylora", r=8, granularity=3)
    with pytest.raises(RecipeError, match=r"stack\.dylora\.granularity: r=8 is no multiple of 3"):
        method.attach(tiny_model())
    method.attach(tiny_model(), method.structure(tiny_model()))


def test_ranks_above_the_one_in_use_do_not_matter() -> None:
    model, _, _ = adapted(rank=2)
    wanted = model(input_ids=IDS).logits
    for hook in hooks(model):
        hook.A.data[2:] = 1e3
        hook.B.data[:, 2:] = 1e3
    assert torch.equal(model(input_ids=IDS).logits, wanted)


@pytest.mark.parametrize("freeze", ["grad", "strict"])
def test_strict_keeps_other_ranks_and_their_moments_bit_equal(freeze: str) -> None:
    model, stack, wrapper = adapted(freeze=freeze)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    moved = False
    for step in range(6):
        before = [(p.A.detach().clone(), {k: v.clone() for k, v in optimizer.state.get(p.A, {}).items()}) for p in hooks(model)]
        stack.before_step(model, step)
        loss_of(model).backward()
        with stack.stepping(model, optimizer):
            optimizer.step()
        stack.after_step(model, step)
        optimizer.zero_grad()
        b = wrapper.draw(step)
        for hook, (A, state) in zip(hooks(model), before, strict=True):
            others = [j for j in range(4) if j != b - 1]
            assert not torch.equal(hook.A[b - 1], A[b - 1])
            same = torch.equal(hook.A[others], A[others])
            if state:
                same = same and torch.equal(optimizer.state[hook.A]["exp_avg"][others], state["exp_avg"][others])
            moved = moved or not same
    assert moved is (freeze == "grad")


def test_ranks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"stack\.dylora\.rank: 9 is larger than r=4"):
        adapted(rank=9)
    with pytest.raises(RecipeError, match="r_min"):
        adapted(r_min=5)


def test_merging_at_a_rank_gives_the_logits_of_that_rank() -> None:
    model, _, wrapper = adapted(rank=3)
    wanted = model(input_ids=IDS).logits
    wrapper.merge(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parity("dylora", "PEFT LoraConfig of that rank")
@pytest.mark.parametrize("b", [1, 3])
def test_an_export_at_a_rank_is_the_model_at_that_rank_under_peft(tmp_path: Path, b: int) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from llmrecipe.interop.peft.exporter import export_peft

    base = base_folder(tmp_path)
    model = saved_run(tmp_path / "run", base, Dylora(name="dylora", r=4, alpha=6.0))
    for hook in hooks(model):
        hook.use(b)
    wanted = model(input_ids=IDS).logits
    folder = export_peft(tmp_path / "run", options={"dylora": {"rank": b}}).path
    twin = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    torch.testing.assert_close(twin(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)
    assert twin.peft_config["default"].r == b
    assert twin.peft_config["default"].lora_alpha == 6


@pytest.mark.slow
def test_one_run_is_flat_in_the_rank_where_a_truncated_lora_collapses() -> None:
    """A random rank-4 change of one layer is learned; squared error by rank b, DyLoRA against LoRA cut afterwards."""
    torch.manual_seed(0)
    x, goal = torch.randn(256, 16), torch.randn(16, 2) @ torch.randn(2, 16)
    errors = {}
    for nested in (True, False):
        torch.manual_seed(1)
        hook = NestedLowRank(16, 16, 4, 4.0, 0.0, None)
        nn.init.normal_(hook.A, std=0.25)
        nn.init.zeros_(hook.B)
        wrapper = Dylora(name="dylora", r=4, update="full")
        optimizer = torch.optim.AdamW(hook.parameters(), lr=1e-2, weight_decay=0.0)
        for step in range(1500):
            b = wrapper.draw(step) if nested else 4
            hook.use(b, wrapper.learning(b))
            loss = (hook.after(x, torch.zeros(256, 16)) - x @ goal.t()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            found = []
            for b in range(1, 5):
                hook.use(b)
                found.append(float((hook.after(x, torch.zeros(256, 16)) - x @ goal.t()).square().mean()))
        errors[nested] = found
    assert errors[True][1] < 0.5 * errors[False][1]
    assert errors[True][0] < errors[False][0]


@pytest.mark.slow
def test_a_finished_run_is_scored_at_any_rank_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    from llmrecipe.core.errors import RunError
    from llmrecipe.evaluation.evaluate_model import evaluate_path
    from tests.trainings import learned, resume, stop_after, train_recipe

    words = ["steps=6", "batch.size=2"]
    train_recipe(tmp_path / "whole", "dylora", *words)
    stop_after(3, tmp_path / "parts", "dylora", *words)
    resume(tmp_path / "parts")
    whole, parts = learned(tmp_path / "whole"), learned(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    low, high = (evaluate_path(str(tmp_path / "whole"), [f"stack.dylora.rank={b}"])["loss"] for b in (1, 8))
    assert low != high
    from llmrecipe.interop.load_run import open_run

    with pytest.raises(RunError, match=r"stack\.dylora\.target: fixed by the training of this run; free to choose: rank"):
        open_run(str(tmp_path / "whole"), options={"dylora": {"target": "attn.q"}})
