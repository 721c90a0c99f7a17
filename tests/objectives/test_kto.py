"""KTO by hand, mismatched pairs, the reference point over micro-batches and processes, parity with the reference trainer."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.objectives.alignment._engines.mismatched import others, reference_point, with_others
from llmrecipe.objectives.alignment.kto import Kto, balance, kto_loss
from llmrecipe.recipe.schema import BatchSection
from tests.objectives.parity import arguments, assert_same, lora_config, mean_loss, ours, share_weights, word_tokenizer, words
from tests.tiny import roles_for, tiny_model

ROWS: list[dict[str, Any]] = [
    {"row": 0, "source_row": 0, "prompt_ids": [5, 6, 7], "completion_ids": [8, 9, 10, 2], "label": True},
    {"row": 1, "source_row": 0, "prompt_ids": [12], "completion_ids": [14, 15, 16, 17, 2], "label": False},
    {"row": 2, "source_row": 1, "prompt_ids": [20, 21, 22, 23, 24], "completion_ids": [25, 2], "label": True},
    {"row": 3, "source_row": 2, "prompt_ids": [30, 31], "completion_ids": [32, 33, 2], "label": True},
    {"row": 4, "source_row": 3, "prompt_ids": [40, 41, 42], "completion_ids": [43, 2], "label": False},
]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_gains_and_losses_by_hand() -> None:
    """beta 0.5, z = 1: a good answer at r = 3 costs 1 - sigma(1), a bad one 1 - sigma(-1); weights multiply."""
    loss = kto_loss(torch.tensor([3.0, 3.0]).double(), torch.tensor([True, False]), 1.0, 0.5, (2.0, 3.0))
    torch.testing.assert_close(
        loss, torch.tensor([2 * (1 - sigmoid(1.0)), 3 * (1 - sigmoid(-1.0))]).double(), atol=1e-7, rtol=1e-6
    )


def test_weights_balance_the_classes() -> None:
    assert balance(400, 400) == balance(40, 30) == balance(7, 0) == (1.0, 1.0)
    for good, bad in ((100, 300), (300, 100), (50, 45)):
        w_good, w_bad = balance(good, bad)
        assert 1.0 - 1e-12 <= w_good * good / (w_bad * bad) <= 4 / 3 + 1e-12


@pytest.mark.parametrize("size", range(2, 10))
def test_no_row_keeps_its_own_answer(size: int) -> None:
    found = others([[i] for i in range(size)], [[10 + i] for i in range(size)])
    assert found == [(i - 1) % size for i in range(size)]
    assert sorted(found) == list(range(size))


@given(
    st.integers(2, 9).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(0, 3), min_size=n, max_size=n), st.lists(st.integers(10, 13), min_size=n, max_size=n)
        )
    )
)
@settings(max_examples=300, deadline=None)
def test_borrowed_answers_are_mismatches_whatever_repeats(step: tuple[list[int], list[int]]) -> None:
    """Sizes 2 to 9 with repeated prompts and answers: never the own answer, never the same prompt where another will do."""
    prompts, answers = [[p] for p in step[0]], [[a] for a in step[1]]
    for i, j in enumerate(others(prompts, answers)):
        different = [k for k in range(len(prompts)) if answers[k] != answers[i]]
        assert (j is None) == (not different)
        if j is not None:
            assert j in different
            assert prompts[j] != prompts[i] or all(prompts[k] == prompts[i] for k in different)


@given(st.integers(2, 9), st.integers(2, 3))
@settings(max_examples=40, deadline=None)
def test_no_process_keeps_an_answer_of_its_own_row(size: int, world: int) -> None:
    """Every row of the step, dealt out to processes, borrows what it borrows in one process: an answer of another row."""
    rows = [{"prompt_ids": [i], "completion_ids": [10 + i, i]} for i in range(size)]
    shares = [rows[rank::world] for rank in range(world)]
    alone = [r["other_ids"] for r in with_others(rows)]
    for rank in range(world):
        found = [r["other_ids"] for r in with_others(shares[rank], shares, rank)]
        assert found == alone[rank::world]
        assert all(other != row["completion_ids"] for other, row in zip(found, shares[rank], strict=True))


class TwoProcesses:
    """Reductions as the first of two processes sees them: the other one adds numbers of its own."""

    rank, world, in_step = 0, 2, False

    def __init__(self, total: float, count: float):
        self.others = torch.tensor([total, count], dtype=torch.float64)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values + self.others


@pytest.mark.parametrize(("total", "count"), [(-100.0, 3.0), (40.0, 2.0), (0.0, 0.0)])
def test_the_reference_point_is_clamped_after_the_mean_over_processes(total: float, count: float) -> None:
    """z = max(0, (own sum + other sum) / (own count + other count)): a mean of pairs, not of the processes' means."""
    model, roles = ours(seed=seed_with(1.0))
    own = plain_z(model) * 5
    micros = next(iter(Kto().batches(iter([ROWS]), roles)))
    roles.runtime = TwoProcesses(total, count)
    z, raw = map(float, reference_point(micros, roles))
    assert raw == pytest.approx((own + total) / (5 + count), rel=1e-4)
    assert z == max(0.0, raw) and (z == 0.0) == (total < -own)


def test_a_row_with_the_same_prompt_is_passed_over() -> None:
    """Rows 0, 1 and 3 ask the same: none of them may lend to another."""
    prompts = [[1], [1], [2], [1], [3]]
    found = others(prompts, [[10], [11], [12], [13], [14]])
    assert all(j is not None and prompts[j] != prompts[i] for i, j in enumerate(found))
    assert others([[1], [1]], [[5], [6]]) == [1, 0], "one prompt: another answer is enough"
    assert others([[1], [1]], [[5], [5]]) == [None, None]
    assert others([[1]], [[5]]) == [None]


def test_processes_borrow_from_the_step_as_one_process_does() -> None:
    alone = [r["other_ids"] for r in with_others(ROWS)]
    shares = [ROWS[0::2], ROWS[1::2]]
    split = [with_others(shares[rank], shares, rank) for rank in (0, 1)]
    assert [r["other_ids"] for r in split[0]] == alone[0::2]
    assert [r["other_ids"] for r in split[1]] == alone[1::2]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0)])
def test_step_zero_is_half_the_mean_weight(weights: tuple[float, float]) -> None:
    roles = roles_for(tiny_model(), Stack([]))
    objective = Kto(desirable_weight=weights[0], undesirable_weight=weights[1])
    loss = float(mean_loss(objective, roles, ROWS).detach())
    assert loss == pytest.approx(0.5 * (3 * weights[0] + 2 * weights[1]) / 5, abs=1e-6)
    batch = next(iter(objective.batches(iter([ROWS]), roles)))[0]
    metrics = objective.loss(batch, roles).metrics
    assert float(metrics["loss/unweighted"][0]) / 5 == pytest.approx(0.5, abs=1e-6)


def plain_z(model: Any) -> float:
    """The mean divergence of row i's prompt with row i-1's answer, from whole logits."""
    base, ratios = tiny_model(), []
    for i, row in enumerate(ROWS):
        answer = ROWS[i - 1]["completion_ids"]
        ids = torch.tensor([row["prompt_ids"] + answer])
        sums = []
        for m in (model, base):
            with torch.no_grad():
                t = m(ids).logits.double().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
            sums.append(float(t[-len(answer) :].sum()))
        ratios.append(sums[0] - sums[1])
    return sum(ratios) / len(ratios)


@functools.cache
def seed_with(sign: float) -> int:
    return next(seed for seed in range(3, 60) if sign * plain_z(ours(seed=seed)[0]) > 0.3)


@pytest.mark.parametrize("micro", [None, 1, 2])
@pytest.mark.parametrize("packing", [True, False])
def test_reference_point_belongs_to_the_step_not_to_its_micro_batches(micro: int | None, packing: bool) -> None:
    model, roles = ours(packing)
    roles.micro_rows = micro
    objective = Kto(beta=0.2)
    micros = next(iter(objective.batches(iter([ROWS]), roles)))
    wanted = plain_z(model)
    for batch in micros:
        assert float(batch.extra["z_raw"]) == pytest.approx(wanted, rel=1e-4)
        assert float(batch.extra["z"]) == pytest.approx(max(0.0, wanted), rel=1e-4)


def test_a_negative_reference_point_is_zero_after_the_mean() -> None:
    for sign in (-1.0, 1.0):
        model, roles = ours(seed=seed_with(sign))
        batch = next(iter(Kto().batches(iter([ROWS]), roles)))[0]
        assert float(batch.extra["z_raw"]) == pytest.approx(plain_z(model), rel=1e-4)
        assert (float(batch.extra["z"]) > 0) == (sign > 0)


def test_the_loss_sends_no_gradient_through_the_reference_point() -> None:
    """d loss / d theta at fixed z: the gradient equals a finite difference in which z stays."""
    model, roles = ours(seed=seed_with(1.0))
    objective = Kto(beta=0.3)
    micros = next(iter(objective.batches(iter([ROWS]), roles)))
    objective.loss(micros[0], roles).total.backward()
    parameter = next(p for n, p in model.named_parameters() if n.endswith("q_proj.lora.B"))
    grad, at = float(parameter.grad[0, 0]), parameter.data[0, 0].item()
    values = []
    for step in (1e-2, -1e-2):
        parameter.data[0, 0] = at + step
        values.append(float(objective.loss(micros[0], roles).total))
    assert grad == pytest.approx((values[0] - values[1]) / 2e-2, rel=0.05, abs=2e-4)


def test_a_step_of_one_row_is_refused() -> None:
    roles = roles_for(tiny_model(), Stack([]))
    with pytest.raises(RunError, match=r"batch\.size above 1"):
        next(iter(Kto().batches(iter([ROWS[:1]]), roles)))
    recipe = SimpleNamespace(batch=BatchSection(size=1))
    with pytest.raises(RecipeError, match=r"batch\.size=2"):
        Kto().check(recipe, range(8))
    recipe.batch = BatchSection(size=3)
    with pytest.raises(RecipeError, match="leave one row"):
        Kto().check(recipe, range(7))
    Kto().check(recipe, range(8))
    # Nine rows after a first batch of two: 2 3 3, and one is left.
    recipe.batch = BatchSection(size=3, warmup={"start": 2, "batches": 1})
    with pytest.raises(RecipeError, match=r"batch\.warmup: .* has one row"):
        Kto().check(recipe, range(9))
    Kto(loss_type="apo_zero_unpaired").check(recipe, range(7))


def test_whole_split_is_evaluated_alike_in_any_micro_batches() -> None:
    model, roles = ours()
    objective = Kto(beta=0.2)
    results = []
    for micro in (None, 1, 2):
        roles.micro_rows = micro
        rows = objective.evaluation_rows(ROWS, list(range(5)))
        tensors: dict[str, list[torch.Tensor]] = {}
        for part in roles.split(rows):
            with torch.no_grad():
                for name, value in objective.collect(objective.collate(part, roles), roles).items():
                    tensors.setdefault(name, []).append(value)
        results.append(objective.finish_evaluation({}, {k: torch.cat(v) for k, v in tensors.items()}))
    assert results[0]["kl/raw"] == pytest.approx(plain_z(model), rel=1e-4)
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-4, abs=1e-6)
    assert results[0]["rewards/accuracies"] in (0.0, 1.0), "rows 0 and 1 come from one pair, the others stand alone"


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "weights"), [(-1.0, (1.0, 1.0)), (1.0, (1.0, 1.0)), (1.0, (0.7, 1.9))])
def test_loss_and_gradients_equal_the_reference_trainer(sign: float, weights: tuple[float, float], tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    model, roles = ours(seed=seed_with(sign))
    data = Dataset.from_list(
        [{"prompt": words(r["prompt_ids"]), "completion": " " + words(r["completion_ids"]), "label": r["label"]} for r in ROWS]
    )
    more = {
        "beta": 0.3,
        "desirable_weight": weights[0],
        "undesirable_weight": weights[1],
        "train_sampling_strategy": "sequential",
    }
    theirs = KTOTrainer(
        tiny_model(), args=KTOConfig(**arguments(tmp_path, 5, **more)), train_dataset=data, processing_class=word_tokenizer(),
        peft_config=lora_config(),
    )  # fmt: skip
    pairs = share_weights(theirs.model, model)
    batch = theirs.data_collator([theirs.train_dataset[i] for i in range(5)])
    objective = Kto(beta=0.3, desirable_weight=weights[0], undesirable_weight=weights[1])
    assert_same(mean_loss(objective, roles, ROWS), theirs.compute_loss(theirs.model, dict(batch)), pairs)
