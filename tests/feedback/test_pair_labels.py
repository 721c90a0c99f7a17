"""Comparisons and revisions: the arithmetic by hand, the invariants, and nothing of a critique in an answer."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llmrecipe.data.toy import grammar
from llmrecipe.evaluation.agreement import agreement
from llmrecipe.feedback.judges.constitution import Constitution, read_constitution
from llmrecipe.feedback.judges.feedback import (
    AnswerPair,
    Draft,
    answer_of,
    compare_answers,
    entropy,
    first_share,
    label_metrics,
    revise_drafts,
)
from llmrecipe.feedback.judges.labeller import Ask, Forgetful, Judge, build_judge
from llmrecipe.feedback.judges.rule import judge_rule


@pytest.fixture
def manners() -> Constitution:
    return read_constitution("manners", "constitution")


def judge_of(function: Any, sure: float = 1.0) -> Judge:
    return build_judge({"kind": "rule", "rule": judge_rule(function).__name__, "sure": sure}, "judge")


PAIRS = [AnswerPair("q", "one", "two"), AnswerPair("q", "a longer answer", "x"), AnswerPair("q", "x", "a longer answer")]


def test_p_by_hand(own_rules: None, manners: Constitution) -> None:
    """P(A), P(B) = .6, .2 as first and .3, .6 as second: p_fwd = .75, p_bwd = 1/3, p = (.75 + 1 - 1/3) / 2."""

    def prefers(ask: Ask, options: Any) -> Any:
        return [0.6, 0.2] if ask.parts["first"] == "one" else [0.3, 0.6]

    judge = judge_of(prefers)
    label = compare_answers(judge, manners, PAIRS[:1], [manners.principles[:1]])[0]
    assert label["forward"] == pytest.approx([0.75]) and label["backward"] == pytest.approx([1 / 3])
    assert label["p"] == pytest.approx((0.75 + 1 - 1 / 3) / 2, abs=1e-12)
    assert label["principles"] == ["polite"] and len(label["logprobs"][0]) == 2
    one_order = compare_answers(judge, manners, PAIRS[:1], [manners.principles[:1]], swap=False)[0]
    assert one_order["p"] == pytest.approx(0.75) and one_order["backward"] == []


def test_a_judge_that_always_says_a_gives_exactly_one_half(own_rules: None, manners: Constitution) -> None:
    def first(ask: Ask, options: Any) -> Any:
        return [0.97, 0.03] if options else "I think it is A."

    for reasoning in (False, True):
        labels = compare_answers(judge_of(first), manners, PAIRS, [manners.principles] * 3, reasoning=reasoning)
        assert [label["p"] for label in labels] == [0.5, 0.5, 0.5]
        assert label_metrics(labels)["position_bias"] == 1.0
    assert label_metrics(labels)["letter_a"] == pytest.approx(0.6)


@pytest.mark.parametrize("reasoning", [False, True])
def test_swapping_the_answers_maps_p_to_its_complement(own_rules: None, manners: Constitution, reasoning: bool) -> None:
    def prefers(ask: Ask, options: Any) -> Any:
        a, b = len(ask.parts["first"]), len(ask.parts["second"])
        return [1.5 * a, b] if options else "hm"  # likes length, and the first place

    labels = compare_answers(judge_of(prefers), manners, PAIRS, [manners.principles] * 3, reasoning=reasoning, clamp=(0.3, 0.6))
    assert labels[1]["p"] == pytest.approx(1.0 - labels[2]["p"], abs=1e-12)
    assert labels[1]["p"] > 0.5 and labels[0]["p"] == pytest.approx(0.5)


def test_a_chain_of_thought_is_clamped(own_rules: None, manners: Constitution) -> None:
    def prefers(ask: Ask, options: Any) -> Any:
        better = len(ask.parts["first"]) > len(ask.parts["second"])
        return [float(better), float(not better)] if options else "The longer one."

    judge = judge_of(prefers)
    label = compare_answers(judge, manners, PAIRS[1:2], [manners.principles[:1]], reasoning=True)[0]
    assert label["p"] == pytest.approx(0.6) and label["rationales"] == ["The longer one."] * 2
    assert compare_answers(judge, manners, PAIRS[1:2], [manners.principles[:1]])[0]["p"] == 1.0


def test_an_ensemble_is_the_mean_over_principles(own_rules: None, manners: Constitution) -> None:
    def prefers(ask: Ask, options: Any) -> Any:
        share = {"polite": 0.9, "topic": 0.3}[ask.parts["principle"]]
        return [share, 1 - share] if ask.parts["first"] == "one" else [1 - share, share]

    label = compare_answers(judge_of(prefers), manners, PAIRS[:1], [manners.principles])[0]
    assert label["p"] == pytest.approx(0.6) and label["forward"] == pytest.approx([0.9, 0.3])


def test_replay_asks_nothing(manners: Constitution) -> None:
    memory = Forgetful()
    judge = build_judge("rule", "judge")
    judge.use_cache(memory)
    first = compare_answers(judge, manners, PAIRS, [manners.principles] * 3)
    assert (judge.count.requested, judge.count.remembered) == (8, 4)  # two of the pairs are each other's swap
    again = build_judge("rule", "judge")
    again.use_cache(memory)
    assert compare_answers(again, manners, PAIRS, [manners.principles] * 3) == first and again.count.requested == 0


def test_a_pair_the_judge_fails_at_has_no_label(own_rules: None, manners: Constitution) -> None:
    def prefers(ask: Ask, options: Any) -> Any:
        return None if "two" in (ask.parts["first"], ask.parts["second"]) else [0.5, 0.5]

    labels = compare_answers(judge_of(prefers), manners, PAIRS, [manners.principles] * 3)
    assert labels[0] is None and labels[1]["p"] == 0.5


def test_shares_of_extreme_letters() -> None:
    assert first_share([0.0, -1e4]) == 1.0 and first_share([-1e4, 0.0]) == 0.0 and first_share([-3.0, -3.0]) == 0.5
    assert first_share([math.log(0.2), math.log(0.6)]) == pytest.approx(0.25)
    assert entropy(0.5) == pytest.approx(math.log(2)) and entropy(1.0) == 0.0


def test_metrics_by_hand() -> None:
    labels = [
        {"p": 0.9, "forward": [0.9], "backward": [0.1], "mass": 1.0},
        {"p": 0.5, "forward": [0.8], "backward": [0.8], "mass": 0.5},
    ]
    found = label_metrics(labels)
    assert found["position_bias"] == 0.5 and found["letter_a"] == pytest.approx(2.6 / 4)
    assert found["confidence"] == pytest.approx(0.2) and found["mass"] == pytest.approx(0.75)
    assert found["entropy"] == pytest.approx((entropy(0.9) + math.log(2)) / 2)
    assert label_metrics([]) == {}


def test_revisions_by_rule_and_by_the_embedded_model(manners: Constitution) -> None:
    prompt, fact = "Tell me about the owl, not the cow.", "The owl is green and likes cake."
    drafts = [Draft(prompt, f"{grammar.RUDE[i]} {fact}") for i in range(4)]
    for judge in (build_judge("rule", "judge"), build_judge({"kind": "local", "path": "tiny"}, "judge")):
        found = revise_drafts(judge, manners, drafts, manners.principles[:1] * 4)
        assert [f["revision"] for f in found] == [f"{grammar.POLITE[i]} {fact}" for i in range(4)]
        assert not any(f["leak"] for f in found)
    assert found[0]["critique"] == "No, it is rude."


def test_a_draft_the_judge_fails_at_has_no_revision(own_rules: None, manners: Constitution) -> None:
    def mute(ask: Ask, options: Any) -> Any:
        bad = {"critique": "b", "revise": "c"}[ask.task]
        return None if ask.parts["answer"] == bad else "  " if ask.parts["answer"] == "d" else ask.task

    found = revise_drafts(judge_of(mute), manners, [Draft("q", a) for a in "abcd"], manners.principles[:1] * 4)
    assert found[0] == {"critique": "critique", "revision": "revise", "leak": False} and found[1:] == [None, None, None]


@pytest.mark.parametrize(
    ("text", "answer", "leak"),
    [
        ("Thank you. The owl is green.", "Thank you. The owl is green.", False),
        (" Revision: Thank you.", "Thank you.", True),
        ("Critique: it is rude.\n\nRevision: Thank you.", "Thank you.", True),
        ("Thank you.\n\nCritique Request: what is wrong?", "Thank you.", True),
        ("Thank you. Critique: none.", "Thank you.", True),
        ("critique: it is rude", "", True),
        ("New answer:\nThank you.", "Thank you.", True),
        ("My critique: of the film", "My critique: of the film", False),
    ],
)
def test_nothing_of_a_critique_is_left_in_an_answer(text: str, answer: str, leak: bool) -> None:
    assert answer_of(text) == (answer, leak)


def test_agreement_by_hand() -> None:
    """2x2 table [[20, 5], [10, 15]]: p_o = .7, p_e = .5 * .6 + .5 * .4 = .5, kappa = .4."""
    one = {i: "yes" if i < 25 else "no" for i in range(50)}
    other = {i: "yes" if i < 20 or 25 <= i < 35 else "no" for i in range(50)}
    found = agreement(one, {**other, 99: "yes"})
    assert (found.items, found.share) == (50, 0.7) and found.kappa == pytest.approx(0.4)
    same = agreement(one, one)
    assert (same.share, same.kappa) == (1.0, 1.0)
    assert agreement({1: "a", 2: "a"}, {1: "a", 2: "a"}).kappa is None
    assert agreement({1: "a"}, {2: "a"}) is None
    from sklearn.metrics import cohen_kappa_score

    assert found.kappa == pytest.approx(cohen_kappa_score([one[i] for i in range(50)], [other[i] for i in range(50)]))
