"""Constitutions: those of the package, a file of one's own, and mistakes in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmrecipe.core.errors import RecipeError
from llmrecipe.feedback.judges.constitution import read_constitution, sample_principles, shipped

OWN = """
name: own
system: Be fair.
principles:
  - id: kind
    critique: Which words are unkind?
    revision: Rewrite it kindly.
    comparison: Which is kinder?
    rating: How kind is it?
  - {id: short, comparison: 'Which is shorter?'}
templates: {comparison: "{prompt}|{request}|A={first}|B={second}", revision: "{answer}|{critique}|{request}"}
few_shot:
  critique: [{prompt: p0, answer: a0, critique: c0, revision: r0}]
  comparison: [{prompt: p0, first: x, second: y, better: B}]
"""


def written(folder: Path, text: str) -> str:
    (folder / "own.yaml").write_text(text, encoding="utf-8")
    return str(folder / "own.yaml")


@pytest.mark.parametrize("name", shipped())
def test_those_of_the_package_are_complete(name: str) -> None:
    made = read_constitution(name, "constitution")
    assert made.name == name
    assert len(made.choose([], ["critique", "revision", "comparison", "rating"], "principles")) == len(made.principles)


def test_questions_of_ones_own_constitution(tmp_path: Path) -> None:
    made = read_constitution(written(tmp_path, OWN), "constitution")
    kind = made.principles[0]
    ask = made.ask_comparison(kind, "q {x}", "one", "two", {"topic": "owl"})
    assert [(t["role"], t["content"]) for t in ask.turns] == [
        ("system", "Be fair."),
        ("user", "p0|Which is kinder?|A=x|B=y"),
        ("assistant", "B"),
        ("user", "q {x}|Which is kinder?|A=one|B=two"),
    ]
    assert ask.task == "compare"
    assert ask.parts == {"prompt": "q {x}", "first": "one", "second": "two", "principle": "kind", "columns": {"topic": "owl"}}
    revision = made.ask_revision(kind, "q", "a", "c", {})
    assert [t["content"] for t in revision.turns] == ["Be fair.", "a0|c0|Rewrite it kindly.", "r0", "a|c|Rewrite it kindly."]
    critique = made.ask_critique(kind, "q", "a", {})
    assert [t["content"] for t in critique.turns][2:] == ["c0", "Question:\nq\n\nAnswer:\na\n\nWhich words are unkind?"]
    rating = made.ask_rating(kind, "q", "a", 10, {})
    assert rating.turns[-1]["content"].endswith("How kind is it?\nReply with one number from 1 (worst) to 10 (best).")


def test_a_chain_of_thought_goes_before_the_verdict(tmp_path: Path) -> None:
    made = read_constitution(written(tmp_path, OWN), "constitution")
    reasoned = made.ask_comparison(made.principles[0], "q", "one", "two", {}, reasoning=True)
    assert reasoned.turns[-1]["content"].endswith(made.templates.reasoning) and len(reasoned.turns) == 2
    verdict = made.ask_verdict(reasoned, "One is kind.")
    assert [t["content"] for t in verdict.turns[2:]] == ["One is kind.", made.templates.verdict]
    assert verdict.parts == reasoned.parts and verdict.key("a", "x") != reasoned.key("a", "x")


def test_principles_are_chosen_by_id_and_by_what_they_ask_for(tmp_path: Path) -> None:
    made = read_constitution(written(tmp_path, OWN), "constitution")
    assert [p.id for p in made.choose([], ["comparison"], "w")] == ["kind", "short"]
    assert [p.id for p in made.choose([], ["critique"], "w")] == ["kind"]
    assert [p.id for p in made.choose(["short"], ["comparison"], "w")] == ["short"]
    with pytest.raises(RecipeError, match=r"w: own has no principle 'kint'; did you mean 'kind'"):
        made.choose(["kint"], ["comparison"], "w")
    with pytest.raises(RecipeError, match=r"w: the principle 'short' of own has no critique and no revision"):
        made.choose(["short"], ["critique", "revision"], "w")


def test_draws_are_fixed_by_their_seed_and_reach_every_principle() -> None:
    made = read_constitution("assistant", "constitution")
    drawn = [sample_principles(made.principles, 1, 0, i)[0].id for i in range(200)]
    assert drawn == [sample_principles(made.principles, 1, 0, i)[0].id for i in range(200)]
    assert {p.id for p in made.principles} == set(drawn)
    assert drawn != [sample_principles(made.principles, 1, 1, i)[0].id for i in range(200)]
    assert len({p.id for p in sample_principles(made.principles, 99, 0)}) == len(made.principles)


def test_the_id_follows_the_content(tmp_path: Path) -> None:
    one = read_constitution(written(tmp_path, OWN), "c").id
    other = read_constitution(written(tmp_path, OWN.replace("kinder", "nicer")), "c").id
    assert one.startswith("own:") and one != other


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("principles: []", r"own.yaml:1: principles: .*at least 1"),
        ("name: x", r"own.yaml: principles: must be given"),
        ("principles: [{id: a, critque: x}]", r"own.yaml:1: principles.0.critque: .*did you mean 'critique'"),
        ("principle: [{id: a, critique: x}]", r"principle: .*did you mean 'principles'"),
        ("principles: [{id: a}]", r"principles.0: the principle 'a' has no request; give one of critique"),
        ("principles:\n- {id: a, critique: x}\n- {id: a, critique: y}", r"own.yaml:3: principles.1.id: two .* called 'a'"),
        ("principles: [{id: a, critique: x}]\ntemplates: {critique: '{anser} {request}'}", r"no slot {anser}; did you mean 'answer'"),  # noqa: E501
        ("principles: [{id: a, critique: x}]\ntemplates: {critique: '{answer} {'}", r"own.yaml:2: templates.critique: not a template"),  # noqa: E501
        ("principles: [{id: a, critique: x}]\ntemplates: {comparison: '{first} {request}'}", r"does not say {second}"),
        ("principles: [{id: a, critique: x}]\nfew_shot: {comparison: [{prompt: p, first: a, second: b, better: C}]}", r"better: must be one of 'A', 'B'"),  # noqa: E501
        ("principles: {a: b}", r"own.yaml:1: principles: must be a list"),
    ],
)  # fmt: skip
def test_mistakes_are_explained_with_their_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_constitution(written(tmp_path, text), "constitution")


def test_a_constitution_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match=r"judge.constitution: there is no file maners .*; did you mean 'manners'"):
        read_constitution("maners", "judge.constitution")
