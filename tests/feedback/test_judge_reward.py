"""Ratings of a judge as a reward: the arithmetic by hand, and inside a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.data.toy.grammar import POLITE, RUDE
from llmrecipe.feedback.judges.rule import judge_rule
from llmrecipe.feedback.rewards.judge import expected_rating
from llmrecipe.objectives.reward_interface import Answer, Rewards
from tests.servers import server
from tests.trainings import events, train_recipe

QUESTION = "Tell me about the owl, not the cow."


def answer(text: str) -> Answer:
    return Answer(QUESTION, text, {"topic": "owl"}, [1], [2], True)


def scores(*answers: Answer, **options: Any) -> list[float | None]:
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
    assert scores(polite, judge={"kind": "rule", "sure": 1.0}, constitution="manners", scale=5) == [1.0]


def test_principles_are_averaged_over_those_rated_by_and_none_is_no_opinion(own_rules: None) -> None:
    """10 of 10 for politeness and 1 of 10 for the topic average to the middle; without the topic's rating, 10 of 10 is left."""

    def rating(ask: Any, options: Any) -> Any:
        if ask.parts["answer"] == "?" or (ask.parts["answer"] == "half" and ask.parts["principle"] == "topic"):
            return None
        best = {"polite": len(options) - 1, "topic": 0}[ask.parts["principle"]]
        return [float(i == best) for i in range(len(options))]

    judge = {"kind": "rule", "rule": judge_rule(rating).__name__, "sure": 1.0}
    reward = Rewards(
        {"judge": {"judge": judge, "constitution": "manners"}, "length": {"kind": "length", "least": 1, "weight": 0.0}}
    )
    reward.open(None)  # type: ignore[arg-type]
    total, own = reward.score([answer("a"), answer("half"), answer("?")])
    assert own["judge"] == [0.0, 1.0, None] and total == [0.0, 1.0, 0.0]
    assert own["judge/unrated"] == [0.0, 0.5, 1.0] and own["judge/mass"] == [1.0, 1.0, None] == own["judge/mass"]
    assert scores(answer("a"), answer("?"), judge=judge, constitution="manners", principles=["polite"]) == [1.0, None]
    with pytest.raises(RunError, match="could rate none of 1 answers"):
        scores(answer("?"), judge=judge, constitution="manners")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge": {"kind": "rul"}}, r"objective.reward.judge.judge.kind: .*did you mean 'rule'"),
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
    """Without a path the policy's own model is the judge: its ratings of the same answers stay those of the base."""
    from llmrecipe.feedback.rewards import judge as module

    seen: list[tuple[list[Answer], list[float]]] = []
    original = module.JudgeReward.score

    def spy(self: Any, answers: Any) -> list[float]:
        values = original(self, answers)
        seen.append((list(answers), values))
        return values

    # On answers that are noise the tiny model puts little of its probability on the numbers (0.09 on one here).
    options = {"judge": {"kind": "local", "path": "tiny"}, "constitution": "manners", "principles": ["polite"], "min_mass": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.JudgeReward, "score", spy)
        reward = "objective.reward={judge: {judge: {kind: local}, constitution: manners, principles: [polite], min_mass: 0.0}}"
        train_recipe(tmp_path / "run", "rloo", *SHORT, reward, stack, "optim.lr=1e-2", "objective.temperature=1.0")
    assert len(seen) >= 3
    for answers, values in (seen[0], seen[-1]):
        assert values == pytest.approx(scores(*answers, **options), abs=1e-3)


def rating(*places: tuple[str, dict[str, float]], text: str) -> dict[str, Any]:
    """A reply with the probabilities of its tokens; none where no place is given."""

    def listing(top: dict[str, float]) -> list[dict[str, Any]]:
        return [{"token": t, "logprob": math.log(p)} for t, p in top.items()]

    content = [{"token": token, "top_logprobs": listing(top)} for token, top in places]
    return {"choices": [{"message": {"content": text}, **({"logprobs": {"content": content}} if places else {})}]}


def rated(reply: dict[str, Any], **options: Any) -> tuple[float, dict[str, list[float]]]:
    """Score and measures of one answer by a judge behind HTTP."""
    with server((200, reply)) as (url, _):
        judge = {"kind": "http", "url": url, "model": "m", "wait": 0.01}
        reward = Rewards({"judge": {"judge": judge, "constitution": "manners", "principles": ["polite"], **options}})
        reward.open(None)  # type: ignore[arg-type]
        total, own = reward.score([answer("a")])
    return total[0], own


def test_a_rating_of_ten_digit_by_digit_is_the_best() -> None:
    """P(10) = .99, P(1) = .01: mean 9.91, rescaled 2 * 8.91 / 9 - 1 = 0.98."""
    score, own = rated(rating(("1", {"1": 1.0}), ("0", {"0": 0.99, ".": 0.01}), text="10"))
    assert score == pytest.approx(0.98)
    assert own == {"judge": [score], "judge/mass": [pytest.approx(1.0)], "judge/unrated": [0.0], "judge/votes": [0.0]}


def test_a_reply_without_a_number_stops_the_run_and_is_shown() -> None:
    with pytest.raises(RunError, match=r"objective\.reward: .*votes name the options.*it says 'I would rather not'.*min_mass"):
        rated(rating(text="I would rather not"))
    words = rating(("I", {"I": 0.7, "7": 0.3}), text="I think it is fine")
    with pytest.raises(RunError, match=r"0\.3 of its probability lies on the options and 0\.5 is required; it says 'I think"):
        rated(words, scale=9)
    score, own = rated(words, scale=9, min_mass=0.2)
    assert score == pytest.approx(0.5, abs=1e-9) and own["judge/mass"] == [pytest.approx(0.3)]
    with pytest.raises(RunError, match="it says 'So'"):
        rated(rating(("So", {"So": 1.0}), text="So"), min_mass=0.0)


def test_ratings_by_vote_are_counted() -> None:
    """8 votes for 9 of 9: (8 + 1) / 17 against 1 / 17 for each of the eight others; mean 1 + (72 + 28) / 17."""
    score, own = rated(rating(text="9"), scale=9)
    assert score == pytest.approx(2 * (100 / 17) / 8 - 1) and own["judge/votes"] == [1.0] and own["judge/mass"] == [1.0]
