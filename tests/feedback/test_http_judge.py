"""The judge behind HTTP meets busy, slow, broken and silent servers."""

from __future__ import annotations

import asyncio
import email.utils
import errno
import itertools
import json
import math
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.core.http_client import Client, Refused, check_address, retry_after
from llmrecipe.feedback.judges.http import first_option
from llmrecipe.feedback.judges.labeller import Ask, Forgetful, Judge, build_judge
from tests.servers import server


def ask(words: str = "A or B?") -> Ask:
    return Ask(({"role": "system", "content": "be fair"}, {"role": "user", "content": words}), "compare")


def reply(text: str = "A", top: dict[str, float] | None = None) -> dict[str, Any]:
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    if top is not None:
        listed = [{"token": t, "logprob": math.log(p)} for t, p in top.items()]
        choice["logprobs"] = {"content": [{"token": text, "top_logprobs": listed}]}
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}


def judge_at(url: str, **options: Any) -> Judge:
    return build_judge({"kind": "http", "url": url, "model": "m", "wait": 0.01, **options}, "judge")


BOTH = {"A": 0.6, " A": 0.1, "B": 0.2, "x": 0.1}


def test_what_is_sent_and_read() -> None:
    with server((200, reply("A", BOTH))) as (url, asked):
        judge = judge_at(url, price_in=2.0, price_out=10.0)
        found = judge.choice_logprobs([ask()], ["A", "B"])[0]
    assert [math.exp(v) for v in found] == pytest.approx([0.7, 0.2])
    body = asked[0]["body"]
    assert asked[0]["path"] == "/score/chat/completions"
    assert body["messages"] == [{"role": "system", "content": "be fair"}, {"role": "user", "content": "A or B?"}]
    assert (body["model"], body["max_tokens"], body["logprobs"], body["top_logprobs"]) == ("m", 1, True, 20)
    count = judge.count
    assert (count.prompt_tokens, count.completion_tokens) == (7, 1)
    assert count.cost == pytest.approx((7 * 2.0 + 1 * 10.0) / 1e6)


def listed(*places: tuple[str, dict[str, float]], text: str | None = None) -> dict[str, Any]:
    """A reply of several tokens, with the probabilities listed at each place."""
    content = [
        {"token": token, "logprob": math.log(top.get(token, 1e-9)),
         "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in top.items()]}
        for token, top in places
    ]  # fmt: skip
    said = "".join(token for token, _ in places) if text is None else text
    return {"choices": [{"message": {"content": said}, "logprobs": {"content": content}}]}


def chosen(options: list[str], *replies: dict[str, Any], **more: Any) -> tuple[Any, Judge, list[dict[str, Any]]]:
    """What a judge makes of a server's replies, given in turn."""
    with server(*((200, r) for r in replies)) as (url, asked):
        judge = judge_at(url, concurrency=1, **more)
        return judge.decide([ask()], options)[0], judge, asked


def values(choice: Any) -> list[float]:
    return [math.exp(v) for v in choice.logprobs]


def test_white_space_around_an_option_does_not_count() -> None:
    tokens = {"\u2581B": 0.3, "\u0120B": 0.2, " A\n": 0.1, "x": 0.4}
    choice, _, _ = chosen(["A", "B"], listed(("B", tokens)))
    assert values(choice) == pytest.approx([0.1, 0.5]) and choice.mass == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("top", "wanted", "mass"),
    [
        # Nothing is left: the other option cannot be.
        ({"A": 1.0}, [1.0, 0.0], 1.0),
        # 0.0004 is left and the least listed has 0.0001: [0, 0.0001].
        ({"A": 0.9995, "x": 0.0001}, [0.9995, 0.00005], 0.9995),
        # 0.02 is left, less than the least listed: [0, 0.02].
        ({"A": 0.9, "x": 0.08}, [0.9, 0.01], 0.9),
        # Both are missing and share what is left: [0, 0.05] each; nothing lies on what is listed.
        ({"x": 0.6, "y": 0.3}, [0.025, 0.025], 0.0),
    ],
)
def test_an_option_that_is_not_listed_is_bounded_by_what_is_left(
    top: dict[str, float], wanted: list[float], mass: float
) -> None:
    choice, _, asked = chosen(["A", "B"], listed((next(iter(top)), top)))
    assert values(choice) == pytest.approx(wanted, abs=1e-12) and choice.mass == pytest.approx(mass)
    assert len(asked) == 1 and math.fsum(values(choice)) <= 1.0


RATINGS = [str(i) for i in range(1, 11)]
FIRST = {"1": 0.96, "9": 0.03, "8": 0.01}
SECOND = {"0": 0.99, ".": 0.01}


def test_a_rating_of_ten_in_two_tokens() -> None:
    """P(10) = .96 * .99, P(1) = .96 * .01, P(9) = .03, P(8) = .01; the others cannot be, since nothing is left."""
    choice, _, asked = chosen(RATINGS, listed(("1", FIRST), ("0", SECOND)))
    wanted = [0.0096, 0, 0, 0, 0, 0, 0, 0.01, 0.03, 0.9504]
    assert values(choice) == pytest.approx(wanted, abs=1e-12) and choice.mass == pytest.approx(1.0)
    assert len(asked) == 1 and asked[0]["body"]["max_tokens"] == 2


def test_a_shared_beginning_beside_the_reply_is_drawn() -> None:
    """The reply says 9; that the 1 of probability .4 goes on to 10 is known from the third reply drawn."""
    first = {"9": 0.6, "1": 0.4}
    nine, ten = listed(("9", first), ("<end>", {"<end>": 1.0})), listed(("1", first), ("0", {"0": 0.95, "<end>": 0.05}))
    choice, judge, asked = chosen(RATINGS, nine, nine, nine, ten, nine)
    assert values(choice) == pytest.approx([0.02, 0, 0, 0, 0, 0, 0, 0, 0.6, 0.38], abs=1e-12)
    assert len(asked) == 4 and judge.count.draws == 3
    assert [(a["body"]["temperature"], a["body"].get("seed")) for a in asked] == [(0.0, None), (1.0, 0), (1.0, 1), (1.0, 2)]
    # No reply passes there in `votes` draws: both options share it. Where 10 is a token of its own, 1 is no beginning of it.
    choice, judge, _ = chosen(RATINGS, nine, votes=2)
    assert values(choice)[::9] == pytest.approx([0.2, 0.2]) and judge.count.draws == 2
    choice, judge, _ = chosen(RATINGS, listed(("9", {"9": 0.6, "1": 0.1, "10": 0.3})))
    assert values(choice)[::9] == pytest.approx([0.1, 0.3]) and judge.count.draws == 0


def test_a_server_that_lists_the_first_place_alone_is_believed_what_it_says() -> None:
    choice, judge, _ = chosen(RATINGS, listed(("1", FIRST), text="10"))
    assert values(choice)[::9] == pytest.approx([0.0, 0.96], abs=1e-12) and judge.count.draws == 0


def test_local_tables_are_read_by_the_same_rule() -> None:
    """The tables of the rating of ten as token ids, every spelling known: the same numbers."""
    from llmrecipe.feedback.judges.choice import read_paths
    from llmrecipe.feedback.judges.local import leads_of

    ids = {"1": 1, "9": 9, "8": 8, "0": 0, ".": 99}
    spellings = [{(i,)} for i in range(1, 10)] + [{(1, 0)}]
    tables = {(): {ids[t]: p for t, p in FIRST.items()}, (1,): {ids[t]: p for t, p in SECOND.items()}}
    for i in range(2, 8):
        tables[()][i] = 0.0
    local = read_paths(tables, leads_of(spellings), 10).choice()
    remote, _, _ = chosen(RATINGS, listed(("1", FIRST), ("0", SECOND)))
    assert values(local) == pytest.approx(values(remote), abs=1e-12) and local.mass == pytest.approx(remote.mass)


def test_one_reply_without_logprobs_costs_one_vote() -> None:
    """The second of four questions is answered without log-probabilities: 4 requests and 2 votes."""
    with server((200, reply("A", BOTH)), (200, reply("A")), (200, reply("A")), (200, reply("no")), (200, reply("A", BOTH))) as (
        url,
        asked,
    ):
        judge = judge_at(url, votes=2, concurrency=1)
        found = judge.decide([ask(str(i)) for i in range(4)], ["A", "B"])
    assert [c.how for c in found] == ["logprobs", "votes", "logprobs", "logprobs"] and len(asked) == 6
    assert values(found[1]) == pytest.approx([2 / 4, 1 / 4]) and found[1].mass == 0.5 and found[1].said == "no"
    count = judge.count
    assert (count.by_logprobs, count.by_votes, count.stray_votes) == (3, 1, 1)


def test_a_server_that_never_gives_logprobs_is_asked_for_them_three_times() -> None:
    with server((200, reply("A"))) as (url, asked):
        judge = judge_at(url, votes=2, concurrency=1)
        judge.decide([ask(str(i)) for i in range(6)], ["A", "B"])
    assert len(asked) == 3 + 6 * 2 and judge.count.by_votes == 6


def test_what_a_sampled_answer_says() -> None:
    assert [first_option(t, ["A", "B"]) for t in ("A", " (B) since", "**A**", "Both", "The answer is A", "", "B.")] == [
        0, 1, 0, None, None, None, 1,
    ]  # fmt: skip
    assert [first_option(t, ["1", "10"]) for t in ("10", "1", "1/10", "100")] == [1, 0, 0, None]
    assert [first_option(t, RATINGS) for t in ("7.5", "7-8", "7 to 8", "7.", "7, since", "8 - good")] == [
        None, None, None, 6, 6, 7,
    ]  # fmt: skip
    assert [first_option(t, ["A", "B"]) for t in ("A or B", "A and B are good", "A and nothing else")] == [None, None, 0]


def test_a_server_without_logprobs_is_asked_for_a_vote() -> None:
    """3 of 4 votes for A: (3 + 1) / (4 + 2); the fourth says neither."""
    texts = iter(["A", "A", "(A) is better", "none of them"])
    with server((200, reply("A")), (200, lambda body: reply(next(texts)))) as (url, asked):
        judge = judge_at(url, votes=4, concurrency=1)
        found = judge.choice_logprobs([ask()], ["A", "B"])[0]
        assert [math.exp(v) for v in found] == pytest.approx([4 / 6, 1 / 6])
        assert len(asked) == 5 and "logprobs" not in asked[1]["body"]
        assert [a["body"]["seed"] for a in asked[1:]] == [0, 1, 2, 3]
    with server((200, reply("A"))) as (url, _), pytest.raises(RunError, match=r"judge\.choices=vote"):
        judge_at(url, choices="logprobs").choice_logprobs([ask()], ["A", "B"])


def test_a_server_that_refuses_logprobs_is_asked_for_a_vote() -> None:
    def answer(body: dict[str, Any]) -> dict[str, Any]:
        return reply("B")

    with server((400, {"error": "logprobs is not supported"}), (200, answer)) as (url, asked):
        found = judge_at(url, votes=2, concurrency=1).choice_logprobs([ask(), ask("again")], ["A", "B"])
    assert [math.exp(v) for v in found[0]] == pytest.approx([1 / 4, 3 / 4]) and found[1] == found[0]
    assert len(asked) == 5


@pytest.mark.parametrize(
    "trouble",
    [(429, {}), (500, {}), (503, b"busy"), (200, b"not json"), (200, b"[" * 100_000), (200, {"choices": []}), (0, 0.6)],
)
def test_trouble_that_passes(trouble: tuple[int, Any]) -> None:
    with server(trouble, trouble, (200, reply("A", BOTH))) as (url, asked):
        judge = judge_at(url, timeout=0.3)
        assert math.exp(judge.choice_logprobs([ask()], ["A", "B"])[0][0]) == pytest.approx(0.7)
    assert len(asked) == 3 and judge.count.failures == 0


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
        judge_at(url, retries=2, timeout=0.2).generate([ask()])


def test_a_question_that_is_refused_is_a_failure_of_its_own() -> None:
    def answer(body: dict[str, Any]) -> Any:
        return b"{" if "bad" in body["messages"][-1]["content"] else reply("fine")

    with server((200, answer)) as (url, asked):
        judge = judge_at(url, retries=1)
        assert judge.generate([ask("good"), ask("bad"), ask("well")]) == ["fine", None, "fine"]
        assert judge.count.failures == 1 and len(asked) == 4
    with server((422, {"error": "content filter"})) as (url, asked):
        judge = judge_at(url)
        assert judge.generate([ask()]) == [None] and len(asked) == 1
        assert judge.choice_logprobs([ask()], ["A", "B"]) == [None]


def test_retry_after_is_obeyed() -> None:
    with server((429, {}, {"Retry-After": "0.4"}), (200, reply("A"))) as (url, asked):
        assert judge_at(url).generate([ask()]) == ["A"]
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
        assert judge_at(url, concurrency=3).generate([ask(w) for w in words]) == words
        assert 2 <= most[0] <= 3
    with server((200, reply("A"))) as (url, asked):
        judge_at(url, per_minute=600).generate([ask(str(i)) for i in range(4)])
    times = sorted(a["at"] for a in asked)
    assert all(b - a >= 0.07 for a, b in itertools.pairwise(times)) and times[-1] - times[0] >= 0.28


def test_each_reply_is_kept_as_it_arrives() -> None:
    """A server breaks down in the middle of a vote: what it said before is in memory and is not asked again."""
    memory = Forgetful()
    with server((200, reply("A")), (200, reply("A")), (500, {})) as (url, asked):
        judge = judge_at(url, votes=3, retries=0, concurrency=1, choices="vote")
        judge.use_cache(memory)
        with pytest.raises(RunError):
            judge.choice_logprobs([ask()], ["A", "B"])
    with server((200, reply("B"))) as (url, asked):
        # The same server, back again: only its address is another one here.
        judge.client.url = url
        found = judge.choice_logprobs([ask()], ["A", "B"])[0]
    assert len(asked) == 1 and [math.exp(v) for v in found] == pytest.approx([3 / 5, 2 / 5])


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = "plain-words-of-the-test"
    monkeypatch.setenv("JUDGE_VARIABLE", secret)
    memory = Forgetful()

    def echo(body: dict[str, Any]) -> bytes:
        return f"who are you, {secret}?".encode()

    with server((200, reply("A")), (403, echo)) as (url, asked):
        judge = judge_at(url, key_env="JUDGE_VARIABLE", concurrency=1)
        judge.use_cache(memory)
        judge.generate([ask("one")])
        with pytest.raises(Refused) as caught:
            judge.generate([ask("two")])
    assert asked[0]["key"] == f"Bearer {secret}"
    assert secret not in str(caught.value) and "<redacted>" in str(caught.value)
    assert caught.value.__cause__ is None
    assert secret not in json.dumps(memory) and secret not in repr(judge) and secret not in judge.identity


def test_the_key_does_not_follow_a_redirect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-of-the-test")
    with server((200, reply("A"))) as (other, reached), server((302, {}, {"Location": other})) as (url, _):
        with pytest.raises(Refused, match="status 302"):
            judge_at(url, key_env="JUDGE_KEY").generate([ask()])
        assert reached == []


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host/v1", "http://", "http://[::1", "http://host:port/", "http://host:99999/"]
)
def test_an_address_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(RecipeError, match=r"judge\.url: must be an address such as"):
        check_address(url, None, None, "judge")


@pytest.mark.parametrize("url", ["https://host", "http://[::1]:8000/v1", "http://host/v1?to=me@home"])
def test_an_address_that_can_be_used_is_accepted(url: str) -> None:
    check_address(url, None, None, "judge")


def test_a_request_inside_a_running_event_loop() -> None:
    """A cell of a notebook runs inside a loop already."""

    async def cell() -> bytes:
        return Client(url, "judge", "reply", retries=0).post({})

    with server((200, b"{}")) as (url, _):
        assert asyncio.run(cell()) == b"{}"


def test_a_refused_connection_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(RunError, match=rf"no reply after 1 attempts; the last: .*Errno {errno.ECONNREFUSED}"):
        Client(f"http://127.0.0.1:{port}/", "judge", "reply", retries=0).post({})
