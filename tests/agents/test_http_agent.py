"""The agent behind HTTP meets busy, slow, broken and silent servers."""

from __future__ import annotations

import email.utils
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.agents.agent import Agent, Ask, Forgetful, build
from llmrecipe.agents.http import first_option, read_logprobs
from llmrecipe.errors import RunError
from llmrecipe.web import Client, Refused, retry_after
from tests.servers import server


def ask(words: str = "A or B?") -> Ask:
    return Ask(({"role": "system", "content": "be fair"}, {"role": "user", "content": words}), "compare")


def reply(text: str = "A", top: dict[str, float] | None = None) -> dict[str, Any]:
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    if top is not None:
        listed = [{"token": t, "logprob": math.log(p)} for t, p in top.items()]
        choice["logprobs"] = {"content": [{"token": text, "top_logprobs": listed}]}
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}


def agent_at(url: str, **options: Any) -> Agent:
    return build({"kind": "http", "url": url, "model": "m", "wait": 0.01, **options}, "agent")


BOTH = {"A": 0.6, " A": 0.1, "B": 0.2, "x": 0.1}


def test_what_is_sent_and_read() -> None:
    with server((200, reply("A", BOTH))) as (url, asked):
        agent = agent_at(url, price_in=2.0, price_out=10.0)
        found = agent.choice_logprobs([ask()], ["A", "B"])[0]
    assert [math.exp(v) for v in found] == pytest.approx([0.7, 0.2])
    body = asked[0]["body"]
    assert asked[0]["path"] == "/score/chat/completions"
    assert body["messages"] == [{"role": "system", "content": "be fair"}, {"role": "user", "content": "A or B?"}]
    assert (body["model"], body["max_tokens"], body["logprobs"], body["top_logprobs"]) == ("m", 1, True, 20)
    count = agent.count
    assert (count.prompt_tokens, count.completion_tokens) == (7, 1)
    assert count.cost == pytest.approx((7 * 2.0 + 1 * 10.0) / 1e6)


def test_a_missing_option_counts_as_the_least_likely_token() -> None:
    assert read_logprobs([("A", -0.1), ("x", -3.0), ("y", -4.0)], ["A", "B"]) == pytest.approx([-0.1, -4.0])
    assert read_logprobs([("\u2581B", -1.0), ("\u0120B", -1.0), (" A\n", -2.0)], ["A", "B"]) == pytest.approx(
        [-2.0, -1.0 + math.log(2)]
    )


def test_what_a_sampled_answer_says() -> None:
    assert [first_option(t, ["A", "B"]) for t in ("A", " (B) since", "**A**", "Both", "The answer is A", "", "B.")] == [
        0, 1, 0, None, None, None, 1,
    ]  # fmt: skip
    assert [first_option(t, ["1", "10"]) for t in ("10", "1", "1/10", "100")] == [1, 0, 0, None]


def test_a_server_without_logprobs_is_asked_for_a_vote() -> None:
    """3 of 4 votes for A: (3 + 1) / (4 + 2); the fourth says neither."""
    texts = iter(["A", "A", "(A) is better", "none of them"])
    with server((200, reply("A")), (200, lambda body: reply(next(texts)))) as (url, asked):
        agent = agent_at(url, votes=4, concurrency=1)
        found = agent.choice_logprobs([ask()], ["A", "B"])[0]
        assert [math.exp(v) for v in found] == pytest.approx([4 / 6, 1 / 6])
        assert len(asked) == 5 and "logprobs" not in asked[1]["body"]
        assert [a["body"]["seed"] for a in asked[1:]] == [0, 1, 2, 3]
    with server((200, reply("A"))) as (url, _), pytest.raises(RunError, match=r"agent\.choices=vote"):
        agent_at(url, choices="logprobs").choice_logprobs([ask()], ["A", "B"])


def test_a_server_that_refuses_logprobs_is_asked_for_a_vote() -> None:
    def answer(body: dict[str, Any]) -> dict[str, Any]:
        return reply("B")

    with server((400, {"error": "logprobs is not supported"}), (200, answer)) as (url, asked):
        found = agent_at(url, votes=2, concurrency=1).choice_logprobs([ask(), ask("again")], ["A", "B"])
    assert [math.exp(v) for v in found[0]] == pytest.approx([1 / 4, 3 / 4]) and found[1] == found[0]
    assert len(asked) == 5


@pytest.mark.parametrize(
    "trouble", [(429, {}), (500, {}), (503, b"busy"), (200, b"not json"), (200, {"choices": []}), (0, 0.6)]
)
def test_trouble_that_passes(trouble: tuple[int, Any]) -> None:
    with server(trouble, trouble, (200, reply("A", BOTH))) as (url, asked):
        agent = agent_at(url, timeout=0.3)
        assert math.exp(agent.choice_logprobs([ask()], ["A", "B"])[0][0]) == pytest.approx(0.7)
    assert len(asked) == 3 and agent.count.failures == 0


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ((500, {}), "no reply after 3 attempts; the last: status 500"),
        ((0, 0.4), "no reply after 3 attempts"),
        ((401, {}), "status 401"),
    ],
)
def test_trouble_that_stays_stops_the_run(trouble: tuple[int, Any], message: str) -> None:
    with server(trouble) as (url, _), pytest.raises(RunError, match=message):
        agent_at(url, retries=2, timeout=0.2).generate([ask()])


def test_a_question_that_is_refused_is_a_failure_of_its_own() -> None:
    def answer(body: dict[str, Any]) -> Any:
        return b"{" if "bad" in body["messages"][-1]["content"] else reply("fine")

    with server((200, answer)) as (url, asked):
        agent = agent_at(url, retries=1)
        assert agent.generate([ask("good"), ask("bad"), ask("well")]) == ["fine", None, "fine"]
        assert agent.count.failures == 1 and len(asked) == 4
    with server((422, {"error": "content filter"})) as (url, asked):
        agent = agent_at(url)
        assert agent.generate([ask()]) == [None] and len(asked) == 1
        assert agent.choice_logprobs([ask()], ["A", "B"]) == [None]


def test_retry_after_is_obeyed() -> None:
    with server((429, {}, {"Retry-After": "0.4"}), (200, reply("A"))) as (url, asked):
        assert agent_at(url).generate([ask()]) == ["A"]
    assert asked[1]["at"] - asked[0]["at"] >= 0.4
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 < retry_after(soon, 1.0) <= 30
    assert [retry_after(v, 1.5) for v in ("", "soon", "7", "-3", "99999", "nan")] == [1.5, 1.5, 7.0, 0.0, 120.0, 1.5]


def test_pauses_double_and_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with server((500, {})) as (url, _), pytest.raises(RunError):
        Client(url, "server", "reply", retries=4, wait=1.0).post({})
    assert len(pauses) == 4
    assert all(0.5 * 2**i <= p <= 1.5 * 2**i for i, p in enumerate(pauses)) and pauses != [1.0, 2.0, 4.0, 8.0]


def test_concurrency_and_rate_are_kept() -> None:
    busy, most = [0], [0]

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        time.sleep(0.05)
        busy[0] -= 1
        return reply(body["messages"][-1]["content"])

    with server((200, answer)) as (url, _):
        words = [str(i) for i in range(12)]
        assert agent_at(url, concurrency=3).generate([ask(w) for w in words]) == words
        assert 2 <= most[0] <= 3
    with server((200, reply("A"))) as (url, asked):
        agent_at(url, per_minute=600).generate([ask(str(i)) for i in range(4)])
    times = sorted(a["at"] for a in asked)
    assert all(b - a >= 0.07 for a, b in itertools.pairwise(times)) and times[-1] - times[0] >= 0.28


def test_each_reply_is_kept_as_it_arrives() -> None:
    """A server breaks down in the middle of a vote: what it said before is in memory and is not asked again."""
    memory = Forgetful()
    with server((200, reply("A")), (200, reply("A")), (500, {})) as (url, asked):
        agent = agent_at(url, votes=3, retries=0, concurrency=1, choices="vote")
        agent.remember(memory)
        with pytest.raises(RunError):
            agent.choice_logprobs([ask()], ["A", "B"])
    with server((200, reply("B"))) as (url, asked):
        # The same server, back again: only its address is another one here.
        agent.client.url = url
        found = agent.choice_logprobs([ask()], ["A", "B"])[0]
    assert len(asked) == 1 and [math.exp(v) for v in found] == pytest.approx([3 / 5, 2 / 5])


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = "plain-words-of-the-test"
    monkeypatch.setenv("JUDGE_VARIABLE", secret)
    memory = Forgetful()

    def echo(body: dict[str, Any]) -> bytes:
        return f"who are you, {secret}?".encode()

    with server((200, reply("A")), (403, echo)) as (url, asked):
        agent = agent_at(url, key_env="JUDGE_VARIABLE", concurrency=1)
        agent.remember(memory)
        agent.generate([ask("one")])
        with pytest.raises(Refused) as caught:
            agent.generate([ask("two")])
    assert asked[0]["key"] == f"Bearer {secret}"
    assert secret not in str(caught.value) and "<redacted>" in str(caught.value)
    assert caught.value.__cause__ is None
    assert secret not in json.dumps(memory) and secret not in repr(agent) and secret not in agent.identity


def test_the_key_does_not_follow_a_redirect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-of-the-test")
    with server((200, reply("A"))) as (other, reached), server((302, {}, {"Location": other})) as (url, _):
        with pytest.raises(Refused, match="status 302"):
            agent_at(url, key_env="JUDGE_KEY").generate([ask()])
        assert reached == []
