"""A model against the one it started from: win rate by hand, divergence and margins against the model's own logits."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from llmrecipe.core.errors import DataError
from llmrecipe.evaluation.evaluate_model import Subject, open_subject
from llmrecipe.evaluation.win_rate import SAMPLES, HeadToHead, HeadToHeadConfig, win_rate

CONFIG = HeadToHeadConfig("builtin:prompts", "builtin:preference", {"rule": {"rule": "manners"}}, 2, 12, 128, "test", 5, 3)


@pytest.fixture(scope="module")
def pairing() -> HeadToHead:
    return HeadToHead(open_subject("tiny", []), CONFIG)


@pytest.fixture(scope="module")
def other() -> Subject:
    """The same model with its last norm bent, so that other answers become likely."""
    subject = open_subject("tiny", [])
    with torch.no_grad():
        subject.roles.model.model.norm.weight[::3] *= 0.8
    return subject


def logprobs(subject: Subject, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """log p of each answer token, from one plain forward pass, in float64."""
    with torch.no_grad():
        logits = subject.roles.model(torch.tensor([[*prompt, *answer]])).logits[0].double()
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return rows[torch.arange(len(answer)), torch.tensor(answer)]


def test_every_answer_meets_every_answer_to_its_own_prompt_and_ties_count_half() -> None:
    own = torch.tensor([[1.0, 0.5], [0.0, 0.0]])
    other = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    # first prompt: 1 1 .5 .5 of 4, second: .5 0 .5 0 of 4
    assert win_rate(own, other) == (3.0 + 1.0) / 8
    assert win_rate(own, own) == 0.5


def test_intervals_are_those_of_prompts_drawn_again(pairing: HeadToHead, monkeypatch: pytest.MonkeyPatch) -> None:
    """Win rate and gain again from their definition, on the prompts of each sample: both models' answers move together."""
    draws = torch.Generator().manual_seed(1)
    scores, start = (torch.rand(5, 2, generator=draws, dtype=torch.float64) for _ in range(2))
    scores[2, 1] = math.nan
    monkeypatch.setattr(pairing, "scores", start)
    found = pairing._facts(pairing.answers, scores, torch.arange(10.0), torch.tensor([1.0, -1.0, 2.0]))
    counts = np.random.default_rng([CONFIG.seed, 5]).multinomial(5, [0.2] * 5, size=SAMPLES)
    values: dict[str, list[float]] = {"win_rate": [], "gain": []}
    for count in counts:
        drawn = torch.repeat_interleave(torch.arange(5), torch.tensor(count))
        values["win_rate"].append(win_rate(scores[drawn], start[drawn]))
        values["gain"].append(float(scores[drawn].nanmean() - start[drawn].mean()))
    assert (found["win_rate"], found["gain"]) == pytest.approx((1 / 3, float(scores.nanmean() - start.mean())))
    for name, drawn_again in values.items():
        low, high = np.quantile(drawn_again, [0.025, 0.975])
        assert (found[f"{name}/low"], found[f"{name}/high"]) == pytest.approx((low, high), abs=1e-12)
        assert low < found[name] < high
    assert {n.rpartition("/")[0] for n in found if n.endswith("/low")} == {n for n in found if "/" not in n}


def test_a_model_against_itself_is_even_and_nowhere_apart(pairing: HeadToHead) -> None:
    found = pairing.measure(pairing.base)
    even = {f"{name}{end}": 0.0 for name in ("margin", "preferred") for end in ("", "/low", "/high")}
    assert found == {**pairing.baseline(), **even}
    assert (found["win_rate"], found["gain"], found["kl"]) == (0.5, 0.0, 0.0)


def test_divergence_is_the_mean_over_answers_of_its_unbiased_estimate(pairing: HeadToHead, other: Subject) -> None:
    answers = pairing.answer(other)
    assert len(answers) == 10 and answers[0].prompt_ids == answers[1].prompt_ids and answers[0].ids != answers[1].ids
    wanted = 0.0
    for answer in answers:
        log = logprobs(other, list(answer.prompt_ids), list(answer.ids)) - logprobs(
            pairing.base, list(answer.prompt_ids), list(answer.ids)
        )
        wanted += float(((-log).exp() - 1 + log).sum())
    found = pairing.measure(other)
    assert wanted > 0.05 and found["kl"] == pytest.approx(wanted / 10, rel=1e-4)
    assert found["length"] == sum(len(a.ids) for a in answers) / 10


def test_answers_end_before_a_stop_text(pairing: HeadToHead) -> None:
    """The same draws, cut: text up to the stop text, tokens up to the one that completes it, ended by themselves."""
    whole = pairing.answers
    stop = whole[0].text.split()[2]
    cut = HeadToHead(pairing.base, dataclasses.replace(CONFIG, pairs=None, stop=(stop,))).answers
    assert any(stop in a.text for a in whole) and not any(stop in a.text for a in cut)
    for one, other in zip(cut, whole, strict=True):
        assert one.text == other.text.partition(stop)[0].strip() and one.ids == other.ids[: len(one.ids)]
        assert one.finished if stop in other.text else one.finished == other.finished


def test_rewards_are_the_rule_s_and_gain_is_over_the_start(pairing: HeadToHead, other: Subject) -> None:
    from llmrecipe.data.toy.scorers import manners

    def mean(answers: list) -> float:
        return sum(manners(a.text, a.columns["topic"], a.columns["avoid"]) for a in answers) / len(answers)

    found = pairing.measure(other)
    assert found["reward"] == pytest.approx(mean(pairing.answer(other)))
    assert found["gain"] == pytest.approx(mean(pairing.answer(other)) - mean(pairing.answers))


def test_margins_are_what_training_moved_the_better_answer_over_the_worse(pairing: HeadToHead, other: Subject) -> None:
    margins = []
    for row in pairing.pairs:
        moved = [
            float((logprobs(other, row["prompt_ids"], row[k]) - logprobs(pairing.base, row["prompt_ids"], row[k])).sum())
            for k in ("chosen_ids", "rejected_ids")
        ]
        margins.append(moved[0] - moved[1])
    found = pairing.measure(other)
    assert len(margins) == 5 and found["margin"] == pytest.approx(sum(margins) / 5, rel=1e-3, abs=1e-3)
    assert found["preferred"] == sum(m > 0 for m in margins) / 5


def test_rows_without_what_the_reward_asks_for_are_refused() -> None:
    config = HeadToHeadConfig("builtin:sums", None, {"rule": {"rule": "manners"}}, 1, 4, 128, "test", 2, 0, "board.reward")
    with pytest.raises(DataError, match=r"board.reward.rule: the row has no column 'topic'"):
        HeadToHead(open_subject("tiny", []), config)


def test_columns_of_the_prompts_reach_the_reward(pairing: HeadToHead) -> None:
    assert pairing.answers[0].columns == json.loads(pairing.prompts[0]["columns"]) and "topic" in pairing.answers[0].columns
