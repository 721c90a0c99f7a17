"""Ratings of an agent as a reward: the arithmetic by hand, and inside a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.agents.rule import agent_rule
from llmrecipe.data.world import POLITE, RUDE
from llmrecipe.errors import RecipeError, RunError
from llmrecipe.rewards.judge import expected_rating
from llmrecipe.rewards.reward import Answer, Rewards
from tests.runs import events, train_recipe

QUESTION = "Tell me about the owl, not the cow."


def answer(text: str) -> Answer:
    return Answer(QUESTION, text, {"topic": "owl"}, [1], [2], True)


def scores(*answers: Answer, **options: Any) -> list[float]:
    reward = Rewards({"judge": options})
    reward.check([])
    reward.open(None)  # type: ignore[arg-type]
    return reward.score(list(answers))[0]


def test_the_mean_rating_is_rescaled() -> None:
    """Ratings 1, 2, 3 with weights 1 : 1 : 2 have the mean 2.25; (2.25 - 1) / 2 * 2 - 1 = 0.25. A constant changes nothing."""
    logs = [math.log(w) for w in (0.1, 0.1, 0.2)]
    assert expected_rating(logs) == pytest.approx(0.25)
    assert expected_rating([v - 700.0 for v in logs]) == pytest.approx(0.25)
    assert expected_rating([0.0, -1e4]) == -1.0 and expected_rating([-1e4, 0.0]) == 1.0


def test_the_rule_rates() -> None:
    """The rule gives .9 to its rating and shares the rest: 10 of 10 has the mean 1 + 9 * .9 + .1 * 4 = 9.5 or so."""
    polite, rude = (
        answer(f"{POLITE[0]} The owl is green and likes cake."),
        answer(f"{RUDE[0]} The cow is white and likes corn."),
    )
    best = 2 * (0.9 * 9 + 0.1 / 9 * sum(range(9))) / 9 - 1
    assert scores(polite, rude, constitution="manners") == pytest.approx([best, -best])
    assert scores(polite, agent={"kind": "rule", "sure": 1.0}, constitution="manners", scale=5) == [1.0]


def test_principles_are_averaged_and_failures_are_the_middle(own_rules: None) -> None:
    def rating(ask: Any, options: Any) -> Any:
        if ask.parts["answer"] == "?":
            return None
        best = {"polite": len(options) - 1, "topic": 0}[ask.parts["principle"]]
        return [float(i == best) for i in range(len(options))]

    agent = {"kind": "rule", "rule": agent_rule(rating).__name__, "sure": 1.0}
    assert scores(answer("a"), answer("?"), agent=agent, constitution="manners") == [0.0, 0.0]
    assert scores(answer("a"), answer("?"), agent=agent, constitution="manners", principles=["polite"]) == [1.0, 0.0]
    with pytest.raises(RunError, match="could rate none of 1 answers"):
        scores(answer("?"), agent=agent, constitution="manners")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"agent": {"kind": "rul"}}, r"objective.reward.judge.agent.kind: .*did you mean 'rule'"),
        ({"constitution": "maners"}, r"objective.reward.judge.constitution: .*did you mean 'manners'"),
        ({"principles": ["hram"]}, r"objective.reward.judge.principles: .*did you mean 'harm'"),
        ({"scale": 1}, r"objective.reward.judge.scale: must be >= 2"),
    ],
)
def test_wrong_options_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Rewards({"judge": options}).check([])


SHORT = ["batch.size=4", "objective.max_new_tokens=8", "eval.batches=1", "steps=2", "objective.show=0"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["rloo", "ppo", "grpo"])
def test_the_rule_as_judge_inside_a_run(recipe: str, tmp_path: Path) -> None:
    """The judge's score is the rule's worth, rescaled: 0.9 (2 w - 1) up to what is spread over the other ratings."""
    reward = "objective.reward={judge: {constitution: manners, scale: 3}, rule: {rule: manners, weight: 0.0}}"
    train_recipe(tmp_path / "run", recipe, *SHORT, reward)
    found = [*events(tmp_path / "run"), *events(tmp_path / "run", "evaluation")]
    for event in found:
        prefix = "eval/" if "eval/rewards/judge" in event else ""
        assert event[f"{prefix}rewards/judge"] == pytest.approx(0.85 * (2 * event[f"{prefix}rewards/rule"] - 1), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["stack=[lora]", "stack=[]"])
def test_the_policy_of_step_zero_judges_itself(stack: str, tmp_path: Path) -> None:
    """Without a path the policy's own model is the agent: its ratings of the same answers stay those of the base."""
    from llmrecipe.rewards import judge as module

    seen: list[tuple[list[Answer], list[float]]] = []
    original = module.Judge.score

    def spy(self: Any, answers: Any) -> list[float]:
        values = original(self, answers)
        seen.append((list(answers), values))
        return values

    options = {"agent": {"kind": "local", "path": "tiny"}, "constitution": "manners", "principles": ["polite"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Judge, "score", spy)
        reward = "objective.reward={judge: {agent: {kind: local}, constitution: manners, principles: [polite]}}"
        train_recipe(tmp_path / "run", "rloo", *SHORT, reward, stack, "optim.lr=1e-2", "objective.temperature=1.0")
    assert len(seen) >= 3
    for answers, values in (seen[0], seen[-1]):
        assert values == pytest.approx(scores(*answers, **options), abs=1e-3)
