"""A language model behind HTTP as the judge."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, cast

from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.core.foreign import parse_json
from llmrecipe.core.http_client import Client, Refused, Unreadable, check_address
from llmrecipe.core.option_types import Field, Literal, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, StopText
from llmrecipe.core.redact import variable_of
from llmrecipe.core.registry import register
from llmrecipe.feedback.judges.choice import Open, Path, Reading, read_paths
from llmrecipe.feedback.judges.chosen import Choice
from llmrecipe.feedback.judges.labeller import Ask, Judge, short_hash

PATH = "/chat/completions"
STOPS = (301, 302, 303, 307, 308, 401, 402, 403, 404, 405)
"""Refusals that every further request would meet too."""
BLANK = str.maketrans("\u2581\u0120\u010a", "  \n")
"""Maps white space as tokenizers write it to plain white space."""
UNDECIDED = 0.02
"""Probability of shared beginnings that is not worth another reply."""
SILENT = 3
"""Questions without log-probabilities, and none with them, after which a server is taken to give none."""
PROBE = 20
"""One question of this many requests log-probabilities of such a server all the same."""


@register
class Http(Judge):
    """A model behind an OpenAI-compatible server: POST URL/chat/completions.

    A choice follows `top_logprobs` token by token along the reply (see `choice`), white space around an option
    left out: 10 in two tokens is P("1") P("0" | "1"). Where a listed token begins several options and the reply takes another
    way (1 and 10 after a reply of 9), up to `votes` further replies are drawn at temperature 1, until less than 2 % of the
    probability is undecided. A question whose reply has no log-probabilities is put to `votes` sampled answers instead, and
    log((n_i + 1) / (votes + K)) is taken of the n_i answers that begin with option i of K; so is every question once the
    server refuses log-probabilities, or has left them out of its first three replies, but for one question in twenty, which
    tries again.

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
    """Number of tokens the server should list."""
    votes: PositiveInt = 8
    """Answers to a vote, and most replies drawn to tell options apart that begin with the same token."""
    temperature: NonNegativeFloat = 0.7
    """Of texts; votes are drawn at 1."""
    max_new_tokens: PositiveInt = 256
    """Of texts."""
    stop: list[StopText] = Field(default_factory=list)
    """Before which texts end."""
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
        """Refuse a missing address or model name, or a missing token where one is needed."""
        check_address(self.url, self.key, self.key_env, where)
        if not self.model:
            raise RecipeError(f"{where}.model: must be given: the name of the model on {self.client.clean(self.url)}")

    @functools.cached_property
    def client(self) -> Client:
        """Hold the connection, made on first use."""
        return Client(
            self.url,
            "judge",
            "reply",
            variable_of(self.key) or self.key_env,
            self.timeout,
            self.retries,
            self.wait,
            self.per_minute,
            accept=_wrong,
        )

    @functools.cached_property
    def _found(self) -> dict[str, Any]:
        return {"vote": self.choices == "vote", "given": False, "silent": 0, "questions": 0}

    @property
    def identity(self) -> str:
        """Return the model's name and a digest of everything its replies depend on."""
        options: list[object] = [self.choices, self.top_logprobs, self.votes, self.temperature, self.max_new_tokens]
        options += [self.stop] if self.stop else []
        return f"http:{self.model}:{short_hash(self.client.clean(self.url), self.model, *options)}"

    def write(self, requests: Sequence[Ask]) -> Iterator[tuple[int, str | None]]:
        """Yield one completion for each request."""

        settings: dict[str, Any] = {"max_tokens": self.max_new_tokens, "temperature": self.temperature}
        settings |= {"stop": self.stop} if self.stop else {}

        def one(ask: Ask) -> str | None:
            reply = self._ask(ask, settings)
            return None if reply is None else _text(reply)

        yield from self._all(one, requests)

    def choose(self, requests: Sequence[Ask], options: Sequence[str]) -> Iterator[tuple[int, Choice | None]]:
        """Yield choices by log-probabilities along the reply, or by a vote.

        Raises:
            RunError: `choices` is `logprobs` and the server gives none.
        """
        yield from self._all(lambda ask: self._choice(ask, tuple(options)), requests)

    def _choice(self, ask: Ask, options: tuple[str, ...]) -> Choice | None:
        if self._wants_logprobs():
            more = {"max_tokens": max(map(len, options)), "temperature": 0.0}
            reply = self._ask(ask, {**more, "logprobs": True, "top_logprobs": self.top_logprobs}, logprobs=True)
            read = Replies(options)
            if reply is not None and read.add(reply):
                with self._lock:
                    self._found.update(given=True, vote=False, silent=0)
                return self._drawn(ask, read)
            if reply is None and not self._found["vote"]:
                return None
            if self.choices == "logprobs":
                raise RunError(
                    f"judge {self.client.clean(self.url)}: replies hold no top_logprobs; choose by vote: judge.choices=vote"
                )
            self._without_logprobs()
        return self._vote(ask, options)

    def _wants_logprobs(self) -> bool:
        """Return whether the next question requests log-probabilities; one of `PROBE` does though the server gave none."""
        if self.choices == "vote":
            return False
        with self._lock:
            self._found["questions"] += 1
            return not self._found["vote"] or self._found["questions"] % PROBE == 0

    def _drawn(self, ask: Ask, read: Replies) -> Choice:
        """Return the choice, with further replies where a listed token is a prefix of several options."""
        more = {"max_tokens": max(map(len, read.options)) + 1, "temperature": 1.0}
        for number in range(self.votes):
            if read.undecided() <= UNDECIDED:
                break
            drawn = {"seed": number, "logprobs": True, "top_logprobs": self.top_logprobs}
            reply = self._ask(ask, {**more, **drawn})
            if reply is None:
                break
            read.add(reply)
            with self._lock:
                self.count.draws += 1
        return read.choice()

    def _without_logprobs(self) -> None:
        """Note a reply without log-probabilities: a server that never sends any gets no further requests for them."""
        with self._lock:
            self._found["silent"] += 1
            if self._found["silent"] >= SILENT and not self._found["given"]:
                self._found["vote"] = True

    def _vote(self, ask: Ask, options: tuple[str, ...]) -> Choice | None:
        counts = [0] * len(options)
        texts: list[str] = []
        for number in range(self.votes):
            key = ask.key(self.identity, f"vote {number}", options)
            text = cast(str | None, self.cached(key))
            if text is None:
                with self._lock:
                    self.count.vote_requests += 1
                reply = self._ask(ask, {"max_tokens": 8, "temperature": 1.0, "seed": number})
                if reply is None:
                    return None
                text = _text(reply)
                self.cache_reply(key, text)
            said = first_option(text, options)
            if said is not None:
                counts[said] += 1
            texts.insert(0 if said is None else len(texts), text)
        with self._lock:
            self.count.stray_votes += self.votes - sum(counts)
        logprobs = [math.log((n + 1) / (self.votes + len(options))) for n in counts]
        return Choice(logprobs, sum(counts) / self.votes, "votes", texts[0])

    def _ask(self, ask: Ask, more: dict[str, Any], logprobs: bool = False) -> dict[str, Any] | None:
        """Return the parsed reply; None where the server refuses this request or never sends a readable reply."""
        body = {"model": self.model, "messages": [dict(t) for t in ask.turns], **more}
        with self._lock:
            self.count.logprob_requests += "logprobs" in more
        try:
            reply = parse_json(self.client.post(body, PATH))
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
        self.keep_count()
        return reply

    def _all(self, one: Callable[[Ask], Any], requests: Sequence[Ask]) -> Iterator[tuple[int, Any]]:
        """Send every request, at most `concurrency` at once, and yield each reply as it arrives."""
        pool = ThreadPoolExecutor(self.concurrency)
        under_way = {pool.submit(one, ask): index for index, ask in enumerate(requests)}
        try:
            for done in as_completed(under_way):
                yield under_way[done], done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _wrong(reply: bytes) -> str | None:
    """Describe what is wrong with the form of a reply; None where it is valid."""
    try:
        message = parse_json(reply)["choices"][0]["message"]
        ok = isinstance(message.get("content") or "", str)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        ok = False
    return None if ok else f"a reply that is not a chat completion: {reply[:120]!r}"


def _text(reply: dict[str, Any]) -> str:
    return str(reply["choices"][0]["message"].get("content") or "").strip()


class Replies:
    """Replies to one question, and the tables of token probabilities along them."""

    def __init__(self, options: Sequence[str]):
        self.options = list(options)
        self.tables: dict[Path, dict[str, float]] = {}
        self.texts: list[str] = []

    def add(self, reply: dict[str, Any]) -> bool:
        """Add a reply; return False where it has no log-probabilities."""
        path: Path = ()
        for token, table in _places(reply):
            self.tables.setdefault(path, table)
            path = (*path, token)
        self.texts.append(_text(reply))
        return () in self.tables

    def choice(self) -> Choice:
        """Return the choice as far as it is known."""
        return self._read().choice(self._passing, self.texts[0])

    def undecided(self) -> float:
        """Return the probability of prefixes that several options share and no reply follows."""
        return math.fsum(place.probability for place in self._read().open if not self._passing(place))

    def _read(self) -> Reading:
        return read_paths(self.tables, self._leads, len(self.options))

    def _passing(self, place: Open) -> list[int]:
        said = [first_option(text, self.options) for text in self.texts if text.startswith(_words(place.path))]
        return [option for option in said if option in place.options]

    def _leads(self, path: Path) -> tuple[int | None, frozenset[int]]:
        text = _words(path)
        word = text.rstrip()
        own = self.options.index(word) if word in self.options else None
        if text != word:
            return own, frozenset()
        single = self._single if word else ()
        further = (i for i, o in enumerate(self.options) if o.startswith(word) and o != word and o not in single)
        return own, frozenset(further)

    @property
    def _single(self) -> set[str]:
        """Return the options that are a single token of this server: no shorter token is a prefix of them."""
        heads = [table for path, table in self.tables.items() if not _words(path)]
        return {word for table in heads for token in table if (word := _words((token,)).rstrip()) in self.options}


def _words(path: Path) -> str:
    """Join tokens to text, without leading white space."""
    return "".join(path).translate(BLANK).lstrip()


def _places(reply: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Return (token, probability of each listed token) of each position of a reply, up to the first without a list."""
    found: list[tuple[str, dict[str, float]]] = []
    try:
        for place in reply["choices"][0]["logprobs"]["content"]:
            token = str(place.get("token", ""))
            table: dict[str, float] = {}
            for item in place["top_logprobs"]:
                table[str(item["token"])] = table.get(str(item["token"]), 0.0) + math.exp(min(float(item["logprob"]), 0.0))
            if token and token not in table and place.get("logprob") is not None:
                table[token] = math.exp(min(float(place["logprob"]), 0.0))
            if not table or any(value != value for value in table.values()):
                break
            found.append((token, table))
    except (TypeError, KeyError, IndexError, ValueError, AttributeError):
        pass
    return found


def first_option(text: str, options: Sequence[str]) -> int | None:
    """Find the option that a text begins with, as a separate word; brackets and marks before it are ignored.

    None also where a number continues after a point (7.5), and where another option follows at once (A or B, 7-8).
    """
    any_of = "|".join(re.escape(o) for o in sorted(options, key=len, reverse=True))
    more = rf"(?!\w|[.,]\d|\s*(?:-|\u2013|or|and|to)\s*(?:{any_of})(?!\w))"
    found = re.match(rf"[\W_]*({any_of}){more}", text)
    return list(options).index(found[1]) if found else None
