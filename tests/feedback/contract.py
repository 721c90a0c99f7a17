"""Every registered metric and reward through the same promises.

A metric: its example by hand, scores within its bounds, the better end for an answer that is its reference, a number for empty
texts. A reward: one finite number an answer, whatever the others are and in whatever order they come; `check` refuses rows
without the columns it reads, so that no score fails later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.data.toy.grammar import POLITE
from llmrecipe.feedback.rewards.function import FUNCTIONS
from llmrecipe.objectives.reward_interface import Answer, Rewards
from tests.servers import server

TEXTS = ["", " ", "the red hen", "Der Hahn – 3,5", "42", "a b c d e f g", "日本語", "#### -7.5"]


def metric_class(name: str) -> Any:
    """A metric, or a skip where its library is not installed."""
    cls = registry.load_class("metric", name)
    if cls.library:
        pytest.importorskip(cls.library)
    return cls


@pytest.mark.parametrize("name", registry.names("metric"))
def test_a_metric_gives_its_example(name: str) -> None:
    cls = metric_class(name)
    prediction, reference, value = cls.example
    assert cls().score(prediction, reference) == pytest.approx(value, abs=1e-12)
    assert prediction != reference, "the example shows more than equality"


@pytest.mark.parametrize("name", registry.names("metric"))
def test_a_metric_stays_within_its_bounds_and_knows_its_better_end(name: str) -> None:
    metric = metric_class(name)()
    assert metric.direction in ("min", "max")
    least, most = metric.bounds
    scores = [metric.score(prediction, reference) for prediction in TEXTS for reference in TEXTS]
    assert all(isinstance(score, float) and math.isfinite(score) for score in scores)
    assert all(least <= score <= most for score in scores)
    reference = metric.example[1]
    assert metric.score(reference, reference) == (most if metric.direction == "max" else least)
    assert len({metric.score(text, reference) for text in [reference, *TEXTS]}) > 1, "it tells answers apart"


ANSWERS = [
    Answer("a prompt", text, {"answer": "42", "topic": "owl", "avoid": "hen", "source": "Owl 42"}, [1, 2], ids, finished)
    for text, ids, finished in (
        ("42", [5, 2], True),
        ("It is 43, said the owl.", [5, 6, 7, 8, 2], True),
        ("", [], False),
        (f"{POLITE[0]} The owl is brown.", [5] * 30, False),
        ('{"a": 1}', [9, 9, 2], True),
    )
]
OPTIONS: dict[str, dict[str, Any]] = {
    "regex": {"pattern": r"\d+"},
    "length": {"least": 1, "most": 4, "slack": 8},
    "format": {"is_json": True},
    "function": {"function": "digits"},
    "judge": {"judge": {"kind": "rule", "rule": "manners"}, "constitution": "manners"},
    "http": {"url": "filled in by the test"},
}
"""Options a kind needs to score anything; one that is not named runs with its defaults."""
ELSEWHERE = {"model": "tests/feedback/test_reward_model.py trains the model it asks"}
KINDS = [name for name in registry.names("reward") if name not in ELSEWHERE]


def answered(body: dict[str, Any]) -> dict[str, Any]:
    """The length of every answer, as a server's scores."""
    return {"scores": [len(a["answer"]) for a in body["answers"]]}


def scored(kind: str, answers: Sequence[Answer], options: dict[str, Any]) -> list[float]:
    """The scores of a reward that was checked and opened as a run does."""
    rewards = Rewards({"one": {"kind": kind, **options}})
    rewards.check(sorted({name for a in answers for name in a.columns}))
    rewards.open(None)  # type: ignore[arg-type]
    return rewards.score(answers)[1]["one"]


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FUNCTIONS, "digits", lambda text: sum(c.isdigit() for c in text))


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_is_one_number_an_answer_whatever_its_neighbours(kind: str, digits: None) -> None:
    with server((200, answered)) as (url, _):
        options = {**OPTIONS.get(kind, {}), **({"url": url} if kind == "http" else {})}
        whole = scored(kind, ANSWERS, options)
        assert len(whole) == len(ANSWERS) and all(math.isfinite(score) for score in whole)
        assert len(set(whole)) > 1, "it tells answers apart"
        assert scored(kind, ANSWERS[::-1], options)[::-1] == pytest.approx(whole)
        assert [scored(kind, [answer], options)[0] for answer in ANSWERS] == pytest.approx(whole)
        assert Rewards({"one": {"kind": kind, **options}}).score([]) == ([], {"one": []} | {
            f"one/{m}": [] for m in registry.load_class("reward", kind).measures
        })  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_refuses_rows_without_the_columns_it_reads(kind: str, digits: None) -> None:
    """Either the check stops the recipe, naming the column, or answers without columns can be scored."""
    bare = [Answer(a.prompt, a.text, {}, a.prompt_ids, a.ids, a.finished) for a in ANSWERS]
    with server((200, answered)) as (url, _):
        options = {**OPTIONS.get(kind, {}), **({"url": url} if kind == "http" else {})}
        try:
            Rewards({"one": {"kind": kind, **options}}).check([])
        except RecipeError as error:
            assert "objective.reward.one" in str(error) and "column" in str(error)
            return
        assert len(scored(kind, bare, options)) == len(bare)


def test_what_is_tested_elsewhere_is_there() -> None:
    for kind, where in ELSEWHERE.items():
        assert kind in registry.names("reward") and Path(where.split()[0]).is_file()
