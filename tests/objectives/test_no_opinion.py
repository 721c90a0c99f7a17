"""Answers of which no reward has an opinion: they take no part in a step, are counted, and a step without any other stops."""

from __future__ import annotations

import importlib
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from llmrecipe.core.errors import RunError
from llmrecipe.evaluation.win_rate import win_rate
from llmrecipe.feedback.rewards.function import FUNCTIONS, reward_function
from llmrecipe.objectives.alignment._engines.rollout import HELD_OUT
from llmrecipe.objectives.alignment.grpo import Grpo
from llmrecipe.objectives.alignment.ppo import Ppo
from llmrecipe.objectives.alignment.rloo import Rloo
from llmrecipe.objectives.reward_interface import Answer
from tests.objectives.rollouts import ROWS, gradients, mean_loss, samples_of, setting, updates
from tests.support import shared
from tests.trainings import events, train_recipe

REWARD = {"score": {"kind": "function", "function": "of_some"}}
KINDS: list[tuple[Any, dict[str, Any]]] = [
    (Grpo, {"answers": 3, "beta": 0.1}),
    (Grpo, {"answers": 3, "beta": 0.1, "scale": "batch", "loss_type": "grpo"}),
    (Rloo, {"answers": 3, "beta": 0.1}),
    (Ppo, {"score_norm": True, "value": "head", "missing_end": None}),
]


@pytest.fixture(autouse=True)
def of_some() -> Any:
    """A reward with an opinion of the answers whose first token is even, and of every answer to a prompt of one token."""

    @reward_function
    def of_some(text: str, answer: Answer) -> float | None:
        return None if answer.ids[0] % 2 and len(answer.prompt_ids) > 1 else answer.ids[0] / 64

    yield
    FUNCTIONS.pop("of_some")


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_step_is_that_of_the_other_answers_alone(kind: Any, options: dict[str, Any], packing: bool) -> None:
    """Loss and gradients of the answers with an opinion laid out by themselves; the share of the others is a metric."""
    objective = kind(reward=REWARD, max_new_tokens=6, **options)
    roles = setting(objective, packing)
    torch.manual_seed(3)
    (batch,) = next(iter(updates(objective, roles)))
    kept, total = batch.extra["score"].numel(), len(ROWS) * options.get("answers", 1)
    assert 1 < kept < total and not batch.extra["score"].isnan().any()
    share, count = objective.loss(batch, roles).metrics["response/no_opinion"]
    assert float(share) / count == pytest.approx((total - kept) / total) and count == kept
    loss = mean_loss(objective, batch, roles)
    loss.backward()

    other = kind(reward=REWARD, max_new_tokens=6, **options)
    alone = setting(other, packing)
    torch.manual_seed(3)
    samples = [s for s in other.live.draw(ROWS, alone) if s.answer.ids[0] % 2 == 0 or len(s.answer.prompt_ids) == 1]
    assert len(samples) == kept
    other.live.measure(samples, alone)
    other.advantages(samples, alone)
    wanted = mean_loss(other, other.ready([other.live.lay_out(samples, alone)], None)[0], alone)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, atol=1e-6, rtol=1e-5)
    found = gradients(roles)
    assert max(float(g.abs().max()) for g in found.values()) > 1e-4
    for name, grad in gradients(alone).items():
        torch.testing.assert_close(found[name], grad, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", [Grpo, Rloo])
def test_advantages_are_by_hand_over_the_answers_that_are_left(kind: Any) -> None:
    """Of three answers to one prompt two are left, of the next one: a difference of 0.6, and nothing to compare with."""
    objective = kind(reward=REWARD, answers=3, max_new_tokens=4, beta=0.0)
    roles = setting(objective)
    samples = samples_of([[8, 2], [9, 2], [10, 2]], [0, 0, 1], [0.2, 0.8, 0.5])
    objective.live.measure(samples, roles)
    objective.advantages(samples, roles)
    found = [float(s.tokens["advantages"][0]) if kind is Grpo else s.numbers["advantages"] for s in samples]
    deviation = (2 * 0.3**2) ** 0.5 + 1e-4
    wanted = [-0.3 / deviation, 0.3 / deviation, 0.0] if kind is Grpo else [-0.6, 0.6, 0.0]
    assert found == pytest.approx(wanted, abs=1e-6)


def test_one_row_twice_in_a_rollout_is_two_groups() -> None:
    objective = Grpo(reward=REWARD, answers=2, max_new_tokens=4)
    roles = setting(objective)
    samples = objective.live.draw([ROWS[1], ROWS[1]], roles)
    assert [s.place for s in samples] == [0, 0, 1, 1]
    objective.live.measure(samples, roles)
    objective.advantages(samples, roles)
    for pair in (samples[:2], samples[2:]):
        assert sum(float(s.tokens["advantages"][0]) for s in pair) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_more_minibatches_than_prompts_left_make_steps_of_nothing(kind: Any, options: dict[str, Any]) -> None:
    objective = kind(reward=REWARD, max_new_tokens=6, minibatches=4, **{"epochs": 1, **options})
    roles = setting(objective)
    rows = [ROWS[1], *[{**ROWS[0], "row": 10 + i, "prompt_ids": [5, 6]} for i in range(3)]]
    FUNCTIONS["of_some"] = lambda text, answer: None if len(answer.prompt_ids) > 1 else 0.5 + answer.ids[0] / 64
    sizes = []
    for (batch,) in updates(objective, roles, rows=rows):
        loss = objective.loss(batch, roles)
        loss.total.backward()
        sizes.append(batch.extra["score"].numel())
        assert sizes[-1] or (float(loss.total) == 0.0 and objective.weight(batch) == 0.0)
    assert sorted(sizes) == [0, 0, 0, options.get("answers", 1)]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_no_opinion_at_all_stops_and_shows_an_answer(kind: Any, options: dict[str, Any]) -> None:
    objective = kind(reward=REWARD, max_new_tokens=6, **options)
    FUNCTIONS["of_some"] = lambda text: None
    with pytest.raises(RunError, match=r"objective\.reward: no reward has an opinion of any answer \(all are None\), such as "):
        next(iter(updates(objective, setting(objective))))


def test_held_out_answers_without_an_opinion_are_counted_and_not_scored() -> None:
    objective = Grpo(reward=REWARD, answers=2, max_new_tokens=6)
    roles = setting(objective)
    batch = objective.collate([{**row, HELD_OUT: True} for row in ROWS], roles)
    found = {name: (float(value), count) for name, (value, count) in objective.evaluate(batch, roles).items()}
    known = batch.extra["score"][~batch.extra["score"].isnan()]
    assert 0 < known.numel() < len(ROWS)
    assert found["score"] == (pytest.approx(float(known.sum())), known.numel()) and found["loss"][0] == -found["score"][0]
    assert found["no_opinion"] == (len(ROWS) - known.numel(), len(ROWS)) and found["length"][1] == len(ROWS)


def test_win_rate_compares_the_pairs_that_have_scores() -> None:
    """Of four pairs of the first prompt two are left, a win and a tie; of the second one, a loss."""
    nan = float("nan")
    own = torch.tensor([[1.0, nan], [0.0, nan]], dtype=torch.float64)
    other = torch.tensor([[0.5, 1.0], [nan, 2.0]], dtype=torch.float64)
    assert win_rate(own, other) == pytest.approx((1.0 + 0.5 + 0.0) / 3)


@pytest.mark.parametrize(
    "recipe", ["grpo", pytest.param("rloo", marks=pytest.mark.slow), pytest.param("ppo", marks=pytest.mark.slow)]
)
def test_a_lone_reward_may_have_no_opinion(recipe: str, tmp_path: Path) -> None:
    @reward_function
    def some(text: str) -> float | None:
        return None if len(text) % 2 else len(text) / 10

    words = ["~objective.reward.rule", "+objective.reward.function={function: some}", "batch.size=4", "data.limit=16"]
    few = ["objective.max_new_tokens=4", "steps=2", "eval.at_start=false", "eval.test=false", "eval.batches=1"]
    few += ["objective.missing_end=null"]
    try:
        train_recipe(tmp_path, recipe, *words, *few, "run.on_nan=stop")
    finally:
        FUNCTIONS.pop("some")
    shares = [event["response/no_opinion"] for event in events(tmp_path)]
    assert len(shares) == 2 and 0 < max(shares) < 1
    assert all(0 < event["objective/scores"] < 5 for event in events(tmp_path))


@pytest.mark.parametrize("function", ["skip", pytest.param("np32", marks=pytest.mark.slow)])
def test_a_function_given_as_a_case(function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None leaves an answer out, float32 of numpy is a number; both train."""
    case = shared("cases", "reward-none-and-numpy")
    monkeypatch.syspath_prepend(str(case / "plug"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    # The case imports the decorator from where it lay when the case was written.
    monkeypatch.setitem(sys.modules, "llmrecipe.rewards", types.ModuleType("llmrecipe.rewards"))
    monkeypatch.setitem(sys.modules, "llmrecipe.rewards.function", sys.modules[reward_function.__module__])
    before = set(FUNCTIONS)
    importlib.import_module("myrewards")
    words = [f"data.path={case / 'pr.jsonl'}", "~objective.reward.rule"]
    words += [f"+objective.reward.function={{function: {function}}}", "batch.size=4", "objective.answers=2"]
    try:
        train_recipe(
            tmp_path, "grpo", *words, "objective.max_new_tokens=4", "steps=2", "eval.at_start=false", "eval.test=false"
        )
    finally:
        sys.modules.pop("myrewards", None)
        for name in set(FUNCTIONS) - before:
            FUNCTIONS.pop(name)
    steps = events(tmp_path)
    assert [event["step"] for event in steps] == [1, 2]
    assert all(0 <= event["response/no_opinion"] < 1 and math.isfinite(event["objective/scores"]) for event in steps)
