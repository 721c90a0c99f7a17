"""Every kind of reward on answers whose worth is known, their weighted sum, and the messages of wrong options."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.feedback.rewards.function import FUNCTIONS, reward_function
from llmrecipe.objectives.alignment._engines.rollout_metrics import reward_metrics
from llmrecipe.objectives.reward_interface import Answer, Rewards
from tests.servers import server


def answer(text: str, finished: bool = True, ids: int = 3, **columns: Any) -> Answer:
    return Answer("a prompt", text, columns, [1, 2], list(range(ids)), finished)


def scores(kind: str, *answers: Answer, **options: Any) -> list[float]:
    reward = Rewards({"one": {"kind": kind, **options}})
    reward.check(sorted({name for a in answers for name in a.columns}))
    return reward.score(list(answers))[0]


def test_exact_match() -> None:
    right, wrong = answer(" 42 ", answer="42"), answer("43", answer="42")
    assert scores("exact_match", right, wrong) == [1.0, 0.0]
    assert scores("exact_match", answer("so it is 1,042.", answer="#### 1042"), compare="last_number") == [1.0]
    assert scores("exact_match", answer("no number", answer="7"), compare="last_number") == [0.0]
    assert scores("exact_match", answer("<a>no</a><a>Yes</a>", answer="yes"), extract="<a>(.*?)</a>", ignore_case=True) == [1.0]
    assert scores("exact_match", answer("yes", gold="yes"), column="gold") == [1.0]


def test_regex() -> None:
    assert scores("regex", answer("it is\n12 now"), answer("none"), pattern=r"is.\d+") == [1.0, 0.0]
    assert scores("regex", answer("12"), answer("12 x"), pattern=r"\d+", where="whole") == [1.0, 0.0]
    assert scores("regex", answer("I am an AI"), pattern="an AI", found=-2.0) == [-2.0]
    several = answer("Sorry, I CANNOT do that."), answer("as an ai model"), answer("The owl is green."), answer("I can")
    declined = ["i (cannot|can't)", "as an AI"]
    assert scores("regex", *several, pattern=declined, ignore_case=True) == [1.0, 1.0, 0.0, 0.0]
    assert scores("regex", *several, pattern=declined) == [0.0, 0.0, 0.0, 0.0]


def test_length() -> None:
    got = scores("length", *(answer("", ids=n) for n in (2, 4, 10, 14, 18, 50)), least=4, most=10, slack=8)
    assert got == [-0.25, 0.0, 0.0, -0.5, -1.0, -1.0]
    assert scores("length", answer("one two three"), most=2, slack=2, unit="words") == [-0.5]
    assert scores("length", answer("abcd"), most=2, slack=4, unit="characters") == [-0.5]


def test_format() -> None:
    good = "<think>a\nb</think>\n<answer>4</answer>"
    texts = (good, good + " more", "<answer>4</answer><think></think>", "<think>a<think></think><answer></answer>")
    assert scores("format", *map(answer, texts), tags=["think", "answer"]) == [1.0, 0.0, 0.0, 0.0]
    assert scores("format", answer('{"a": 1}'), answer('{"b": 1}'), answer("[1]"), answer("{"), json_keys=["a"]) == [1, 0, 0, 0]
    assert scores("format", answer("[1]"), answer("nothing"), is_json=True) == [1.0, 0.0]


def test_rule_takes_its_arguments_from_the_row() -> None:
    from llmrecipe.data.toy.grammar import POLITE, RUDE

    polite = answer(f"{POLITE[0]} The owl is brown.", topic="owl", avoid="horse")
    rude = answer(f"{RUDE[0]} The horse is brown.", topic="owl", avoid="horse")
    half = answer(f"{POLITE[0]} The horse is brown.", topic="owl", avoid="horse")
    assert scores("rule", polite, rude, half, rule="manners") == [1.0, 0.0, 0.5]


@pytest.fixture
def functions() -> Iterator[None]:
    kept = dict(FUNCTIONS)
    yield
    FUNCTIONS.clear()
    FUNCTIONS.update(kept)


def test_function_is_given_what_it_asks_for(functions: None) -> None:
    @reward_function
    def close(text: str, wanted: int, answer: Answer) -> float:
        return -abs(len(text) - wanted) + 0.5 * answer.finished

    assert scores("function", answer("abc", wanted=5), answer("abc", finished=False, wanted=3), function="close") == [-1.5, 0.0]
    with pytest.raises(RecipeError, match=r"no column 'wanted'.*topic"):
        scores("function", answer("abc", topic="x"), function="close")
    with pytest.raises(RecipeError, match="did you mean 'close'"):
        scores("function", answer("abc"), function="clos")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1.0", r"objective.reward.one: .*must be a finite number, or None.*got '1.0' for the answer 'abc' to 'a prompt'"),
        (float("nan"), "got nan for the answer 'abc'"),
        (float("-inf"), "got -inf"),
        (10**400, "got 1000"),
        (np.float32("inf"), "got .*inf"),
        (torch.tensor([1.0, 2.0]), r"got tensor\(\[1"),
        (1j, "got 1j"),
    ],
)
def test_a_score_must_be_a_finite_number(functions: None, value: Any, message: str) -> None:
    @reward_function
    def odd(text: str) -> Any:
        return value

    with pytest.raises(RunError, match=message):
        scores("function", answer("abc"), function="odd")


def test_any_type_of_number_is_a_score(functions: None) -> None:
    values = [True, 3, Fraction(1, 4), Decimal("0.5"), np.float32(1.5), np.int64(2), np.bool_(True), np.array(4.0)]
    values += [torch.tensor(2.5), torch.tensor(True), torch.tensor(0.5, dtype=torch.bfloat16)]

    @reward_function
    def typed(text: str) -> Any:
        return values[int(text)]

    got = scores("function", *(answer(str(i)) for i in range(len(values))), function="typed")
    assert got == [1.0, 3.0, 0.25, 0.5, 1.5, 2.0, 1.0, 4.0, 2.5, 1.0, 0.5]
    assert all(type(score) is float for score in got)


def test_a_reward_without_an_opinion_is_left_out_of_the_sum(functions: None) -> None:
    @reward_function
    def even(text: str) -> Any:
        return None if int(text) % 2 else np.float32(int(text))

    section: dict[str, Any] = {"f": {"kind": "function", "function": "even", "weight": 2.0}}
    both = Rewards({**section, "exact_match": {"weight": 3.0}})
    total, own = both.score([answer("4", answer="4"), answer("3", answer="3"), answer("5", answer="6")])
    assert total == [2.0 * 4 + 3.0, 3.0, 0.0]
    assert own == {"f": [4.0, None, None], "exact_match": [1.0, 1.0, 0.0]}
    total, own = Rewards(section).score([answer("4"), answer("3")])
    assert total == [8.0, None] and own == {"f": [4.0, None]}


def test_http_null_is_no_opinion() -> None:
    with server((200, {"scores": [None, 2]})) as (url, _):
        total, own = Rewards({"http": {"url": url}, "length": {"most": 9}}).score([answer("a"), answer("b")])
    assert total == [0.0, 2.0] and own["http"] == [None, 2.0]


def test_the_mean_of_a_reward_is_over_the_answers_it_scored() -> None:
    nan = float("nan")
    extra = {"score": torch.ones(4), "rewards/a": torch.tensor([1.0, nan, 3.0, nan]), "rewards/b": torch.ones(4)}
    batch: Any = SimpleNamespace(here=SimpleNamespace(extra=extra))
    found = {name: (float(value), count) for name, (value, count) in reward_metrics(batch).items()}
    assert found == {"rewards/a": (4.0, 2.0), "rewards/b": (4.0, 4.0)}


def test_function_of_a_plugin(functions: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "my_rewards_plugin"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "vowels.py").write_text(
        "from llmrecipe.plugin import reward_function\n\n\n@reward_function\ndef vowels(text):\n"
        "    return sum(c in 'aeiou' for c in text)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_plugins", [])
    registry.add_plugin("my_rewards_plugin")
    try:
        assert scores("function", answer("banana"), function="vowels") == [3.0]
    finally:
        registry._plugins.clear()
        registry._index.cache_clear()


def lengths(body: dict[str, Any]) -> dict[str, Any]:
    return {"scores": [len(a["answer"]) for a in body["answers"]]}


def test_http_asks_in_batches_and_sends_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER_KEY", "secret-of-the-test")
    with server((200, lengths)) as (url, asked):
        got = scores("http", answer("a", topic="owl"), answer("bb"), answer("ccc"), url=url, batch=2, key_env="SCORER_KEY")
    assert got == [1.0, 2.0, 3.0]
    assert [len(a["body"]["answers"]) for a in asked] == [2, 1]
    assert asked[0]["body"]["answers"][0] == {"prompt": "a prompt", "answer": "a", "columns": {"topic": "owl"}}
    assert asked[0]["key"] == "Bearer secret-of-the-test"


def test_http_asks_again_when_the_server_is_busy() -> None:
    with server((503, {}), (429, {}), (200, lengths)) as (url, asked):
        assert scores("http", answer("abc"), url=url, wait=0.01) == [3.0]
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("reply", "options", "times", "message"),
    [
        ((500, {}), {"retries": 2}, 3, "no scores after 3 attempts.*status 500"),
        ((400, {"error": "no"}), {}, 1, "status 400"),
        ((200, b"not json"), {}, 1, "the reply is not"),
        ((200, b"[" * 100_000), {}, 1, "the reply is not"),
        ((200, {"scores": [10**400]}), {}, 1, "the reply is not"),
        ((200, {"scores": [1.0, 2.0]}), {}, 1, "2 scores for 1 answers"),
        ((200, {"scores": [float("nan")]}), {}, 1, "must be a finite number.*got nan"),
    ],
)
def test_http_trouble(reply: tuple[int, Any], options: dict[str, Any], times: int, message: str) -> None:
    with server(reply) as (url, asked), pytest.raises(RunError, match=message):
        scores("http", answer("abc"), url=url, wait=0.01, **options)
    assert len(asked) == times


def test_http_gives_up_on_an_address_nobody_answers() -> None:
    with server((200, lengths)) as (url, _):
        pass
    with pytest.raises(RunError, match="no scores after 2 attempts"):
        scores("http", answer("abc"), url=url, wait=0.01, retries=1)


def test_several_rewards_are_a_weighted_sum() -> None:
    section = {"exact_match": {"weight": 2.0}, "short": {"kind": "length", "most": 2, "slack": 4, "weight": 0.5}}
    total, own = Rewards(section).score([answer("yes", answer="yes"), answer("no", answer="yes", ids=2)])
    assert total == [2.0 - 0.5 * 0.25, 0.0]
    assert own == {"exact_match": [1.0, 0.0], "short": [-0.25, 0.0]}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, r"objective.reward: no reward is given to score the answers.*exact_match"),
        ({"exact_mach": {}}, r"objective.reward.exact_mach: .*did you mean 'exact_match'"),
        ({"exact_match": {"colum": "x"}}, r"objective.reward.exact_match.colum: .*did you mean 'column'"),
        ({"exact_match": {"weight": "much"}}, r"objective.reward.exact_match.weight: must be a number"),
        ({"exact_match": 3}, r"objective.reward.exact_match: must be a mapping"),
        ({"exact_match": {}}, r"objective.reward.exact_match: the prompt rows have no column 'answer'.*topic"),
        ({"rule": {"rule": "maners"}}, r"objective.reward.rule.rule: .*did you mean 'manners'"),
        ({"regex": {"pattern": "("}}, r"objective.reward.regex.pattern: not a regular expression"),
        ({"regex": {"pattern": ["a", "("]}}, r"objective.reward.regex.pattern.1: not a regular expression"),
        ({"regex": {"pattern": ["a", ""]}}, r"objective.reward.regex.pattern: must be given"),
        ({"length": {}}, r"objective.reward.length: no bound"),
        ({"format": {}}, r"objective.reward.format: give tags, or is_json"),
        ({"http": {"url": "localhost"}}, r"objective.reward.http.url: must be an address"),
        ({"http": {"url": "http://x", "key_env": "NO_SUCH_KEY_SET"}}, r"NO_SUCH_KEY_SET is not set"),
        ({"model": {}}, r"objective.reward.model.path: must be given"),
        ({"model": {"path": "/nowhere"}}, r"objective.reward.model.path: /nowhere is no finished run"),
    ],
)
def test_wrong_options_are_explained(section: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Rewards(section).check(["topic", "avoid"])
