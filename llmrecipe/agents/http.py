"""A language model behind HTTP as the agent."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from llmrecipe.agents.agent import Agent, Ask, Logprobs, digest
from llmrecipe.errors import RecipeError, RunError
from llmrecipe.fields import Literal, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from llmrecipe.redact import variable_of
from llmrecipe.registry import register
from llmrecipe.web import Client, Refused, Unreadable, check_address

PATH = "/chat/completions"
STOPS = (301, 302, 303, 307, 308, 401, 402, 403, 404, 405)
"""Refusals that every further request would meet too."""
SPACE = " \t\r\n\u2581\u0120"
"""White space, as text and as tokenizers write it."""


@register
class Http(Agent):
    """A model behind an OpenAI-compatible server: POST URL/chat/completions.

    A choice reads `top_logprobs` of the first token of the answer: tokens that are an option, with and without white space
    around it, are summed. An option that is not among them counts as much as the least likely one that is. Where the server
    gives no log-probabilities, `votes` answers are sampled instead and log((n_i + 1) / (votes + K)) is taken of the n_i
    answers that begin with option i of K.

    Requests go out concurrently, are repeated when the server is busy or a reply is malformed, and a question it refuses by
    itself (status 400 or 422) counts as a failure of that question alone. The key is read from the environment.
    """

    url: str = ""
    """Address up to and without /chat/completions, such as http://localhost:8000/v1."""
    model: str = ""
    """Name of the model on the server."""
    key: str | None = None
    """A bearer token, as `${oc.env:NAME}`: the token itself never enters a recipe."""
    key_env: str | None = None
    """The same as the name alone of that environment variable."""
    choices: Literal["auto", "logprobs", "vote"] = "auto"
    """How a choice is read; `auto` votes where the server gives no log-probabilities."""
    top_logprobs: PositiveInt = 20
    """How many tokens the server is asked to list."""
    votes: PositiveInt = 8
    """Answers to a vote."""
    temperature: NonNegativeFloat = 0.7
    """Of texts; votes are drawn at 1."""
    max_new_tokens: PositiveInt = 256
    """Of texts."""
    concurrency: PositiveInt = 8
    """Requests under way at once."""
    per_minute: PositiveInt | None = None
    """Most requests in a minute; null for any."""
    timeout: PositiveFloat = 60.0
    """Seconds to wait for a reply."""
    retries: NonNegativeInt = 5
    """Further attempts after a failure."""
    wait: PositiveFloat = 1.0
    """Seconds before the second attempt, about."""
    price_in: NonNegativeFloat = 0.0
    """Price of a million tokens read."""
    price_out: NonNegativeFloat = 0.0
    """Price of a million tokens written."""

    def check(self, where: str) -> None:
        """The address, the model's name, and the token where one is wanted."""
        check_address(self.url, self.key, self.key_env, where)
        if not self.model:
            raise RecipeError(f"{where}.model: must be given: the name of the model on {self.client.clean(self.url)}")

    @functools.cached_property
    def client(self) -> Client:
        """The connection, made when it is first used."""
        return Client(
            self.url,
            "agent",
            "reply",
            variable_of(self.key) or self.key_env,
            self.timeout,
            self.retries,
            self.wait,
            self.per_minute,
            accept=_wrong,
        )

    @functools.cached_property
    def _found(self) -> dict[str, bool]:
        return {"vote": self.choices == "vote"}

    @property
    def identity(self) -> str:
        """The model's name and a digest of what its replies depend on."""
        options = [self.choices, self.top_logprobs, self.votes, self.temperature, self.max_new_tokens]
        return f"http:{self.model}:{digest(self.client.clean(self.url), self.model, *options)}"

    def write(self, asks: Sequence[Ask]) -> Iterator[tuple[int, str | None]]:
        """One completion a question."""

        def one(ask: Ask) -> str | None:
            reply = self._ask(ask, {"max_tokens": self.max_new_tokens, "temperature": self.temperature})
            return None if reply is None else _text(reply)

        yield from self._all(one, asks)

    def choose(self, asks: Sequence[Ask], options: Sequence[str]) -> Iterator[tuple[int, Logprobs | None]]:
        """Log-probabilities of the first token, or a vote.

        Raises:
            RunError: `choices` is `logprobs` and the server gives none.
        """
        yield from self._all(lambda ask: self._choice(ask, tuple(options)), asks)

    def _choice(self, ask: Ask, options: tuple[str, ...]) -> Logprobs | None:
        if not self._found["vote"]:
            more = {"max_tokens": 1, "temperature": 0.0, "logprobs": True, "top_logprobs": self.top_logprobs}
            reply = self._ask(ask, more, logprobs=True)
            top = None if reply is None else _top(reply)
            if top:
                return read_logprobs(top, options)
            if reply is None and not self._found["vote"]:
                return None
            if self.choices == "logprobs":
                raise RunError(
                    f"agent {self.client.clean(self.url)}: replies hold no top_logprobs; choose by vote: agent.choices=vote"
                )
            self._found["vote"] = True
        return self._vote(ask, options)

    def _vote(self, ask: Ask, options: tuple[str, ...]) -> Logprobs | None:
        counts = [0] * len(options)
        for number in range(self.votes):
            key = ask.key(self.identity, f"vote {number}", options)
            text = self.known(key)
            if text is None:
                reply = self._ask(ask, {"max_tokens": 8, "temperature": 1.0, "seed": number})
                if reply is None:
                    return None
                text = _text(reply)
                self.keep(key, text)
            said = first_option(text, options)
            if said is not None:
                counts[said] += 1
        return [math.log((n + 1) / (self.votes + len(options))) for n in counts]

    def _ask(self, ask: Ask, more: dict[str, Any], logprobs: bool = False) -> dict[str, Any] | None:
        """The parsed reply; None where the server refuses this question, or never sends a reply that can be read."""
        body = {"model": self.model, "messages": [dict(t) for t in ask.turns], **more}
        try:
            reply = json.loads(self.client.post(body, PATH))
        except Refused as error:
            if error.code in STOPS:
                raise
            if logprobs and "logprobs" in str(error) and self.choices == "auto":
                self._found["vote"] = True
            return None
        except Unreadable:
            return None
        used = reply.get("usage") or {}
        with self._lock:
            read, written = int(used.get("prompt_tokens") or 0), int(used.get("completion_tokens") or 0)
            self.count.prompt_tokens += read
            self.count.completion_tokens += written
            self.count.cost += (read * self.price_in + written * self.price_out) / 1e6
        return reply

    def _all(self, one: Callable[[Ask], Any], asks: Sequence[Ask]) -> Iterator[tuple[int, Any]]:
        """Every question, at most `concurrency` at once; each reply as it arrives."""
        pool = ThreadPoolExecutor(self.concurrency)
        under_way = {pool.submit(one, ask): index for index, ask in enumerate(asks)}
        try:
            for done in as_completed(under_way):
                yield under_way[done], done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _wrong(reply: bytes) -> str | None:
    """What is wrong with the form of a reply."""
    try:
        message = json.loads(reply)["choices"][0]["message"]
        ok = isinstance(message.get("content") or "", str)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        ok = False
    return None if ok else f"a reply that is no chat completion: {reply[:120]!r}"


def _text(reply: dict[str, Any]) -> str:
    return str(reply["choices"][0]["message"].get("content") or "").strip()


def _top(reply: dict[str, Any]) -> list[tuple[str, float]]:
    """(token, log-probability) of the likeliest first tokens; empty where the server gives none."""
    try:
        listed = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return [(str(item["token"]), float(item["logprob"])) for item in listed]
    except (TypeError, KeyError, IndexError, ValueError):
        return []


def read_logprobs(top: Sequence[tuple[str, float]], options: Sequence[str]) -> Logprobs:
    """log of the summed probability of the tokens that are each option; a missing one counts as the least likely token."""
    mass = dict.fromkeys(options, 0.0)
    for token, logprob in top:
        word = token.strip(SPACE)
        if word in mass:
            mass[word] += math.exp(logprob)
    least = min(logprob for _, logprob in top)
    return [math.log(m) if m > 0 else least for m in mass.values()]


def first_option(text: str, options: Sequence[str]) -> int | None:
    """Which option a text begins with, as a word of its own; brackets and marks before it do not count."""
    found = re.match(r"[\W_]*(" + "|".join(re.escape(o) for o in sorted(options, key=len, reverse=True)) + r")(?!\w)", text)
    return list(options).index(found[1]) if found else None
