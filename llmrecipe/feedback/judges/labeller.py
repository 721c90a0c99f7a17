"""The interface of a judge (an AI labeller), the requests to it, and the cache of its replies.

A judge writes (`generate`) and chooses (`choice_logprobs`). With a memory on disk each reply is written down as it arrives, so
that a resumed run repeats no request.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from pydantic.dataclasses import dataclass as pydantic_dataclass

from llmrecipe.core import registry
from llmrecipe.core.errors import RecipeError
from llmrecipe.core.registry import CONFIG
from llmrecipe.feedback.judges.chosen import LEAST, Choice

if TYPE_CHECKING:
    from llmrecipe.engine.role_models import Roles
    from llmrecipe.recipe.schema import ModelSection

Turn = Mapping[str, str]
Logprobs = list[float]


@dataclass(frozen=True)
class Ask:
    """One request to a judge."""

    turns: tuple[Turn, ...]
    """The conversation a language model reads: `{"role", "content"}`, the last one a user's."""
    task: str = ""
    """critique, revise, compare or rate: what a rule goes by, which reads no words."""
    parts: Mapping[str, Any] = field(default_factory=dict)
    """What the words were made from: prompt, answer, first, second, principle, columns."""

    def key(self, judge: str, how: str, options: Sequence[str] = ()) -> str:
        """Return a digest of the judge and the request."""
        known = [judge, how, list(options), [dict(t) for t in self.turns], self.task, dict(self.parts)]
        return hashlib.sha256(json.dumps(known, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()[:32]


@dataclass
class Count:
    """Request counts of a judge: of this process and, with a memory on disk, of the earlier starts of the same work."""

    requested: int = 0
    """Requests that the judge itself answered or failed at."""
    remembered: int = 0
    """Requests answered from the cache."""
    failures: int = 0
    """Requests it could not answer."""
    by_logprobs: int = 0
    """Choices read from log-probabilities."""
    by_votes: int = 0
    """Choices read from the words of several replies."""
    stray_votes: int = 0
    """Votes that name no option."""
    draws: int = 0
    """Further replies that were drawn because a listed token begins several options."""
    logprob_requests: int = 0
    """Requests for replies with log-probabilities."""
    vote_requests: int = 0
    """Requests for replies that are read as votes."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    """Cost of the tokens, by the prices given."""


COUNT = "count"
"""Key of the counts in a memory."""


class Memory(Protocol):
    """Replies by the key of their question; `pipelines.steps.workspace.Journal` is one on disk."""

    def __contains__(self, key: str) -> bool: ...

    def __getitem__(self, key: str) -> object: ...

    def add(self, key: str, value: object) -> None:
        """Store a reply."""

    def add_together(self, values: Mapping[str, object]) -> None:
        """Store several values, all or none of them."""


class Forgetful(dict[str, Any]):
    """A cache that lasts as long as its process."""

    def add(self, key: str, value: object) -> None:
        """Store a reply."""
        self[key] = value

    def add_together(self, values: Mapping[str, object]) -> None:
        """Store several values."""
        self.update(values)


@pydantic_dataclass(config=CONFIG, kw_only=True)
class Judge:
    """Base class of a judge, which gives feedback. Fields are the options of `judge: {kind: NAME, ...}`.

    A kind implements `identity`, `write` and `choose`; the two methods that others call are `generate` and `choice_logprobs`.
    """

    group: ClassVar[str] = "judge"

    # --- what a kind implements -----------------------------------------------------------------------------------

    def check(self, where: str) -> None:
        """Refuse options that cannot work, before any weight is read.

        Raises:
            RecipeError: naming the key under `where`.
        """

    def open(self, roles: Roles | None = None) -> None:
        """Prepare for requests; `roles` is the model in training, where there is one."""

    def held_models(self) -> list[ModelSection]:
        """Return the models that it holds in memory in addition to the model in training, for the memory estimate."""
        return []

    @property
    def shares(self) -> bool:
        """Return whether the judge is the model in training itself, and so needs one."""
        return False

    @property
    def identity(self) -> str:
        """Return a short text that names the judge in rows and distinguishes judges whose replies differ."""
        raise NotImplementedError

    def write(self, requests: Sequence[Ask]) -> Iterator[tuple[int, str | None]]:
        """Yield (index, text) of each request, in any order; None where the judge could not answer it."""
        raise NotImplementedError

    def choose(self, requests: Sequence[Ask], options: Sequence[str]) -> Iterator[tuple[int, Choice | Logprobs | None]]:
        """Yield (index, choice) of each request, in any order; log-probabilities alone where their sum is the mass."""
        raise NotImplementedError

    # --- what others call -----------------------------------------------------------------------------------------

    @functools.cached_property
    def count(self) -> Count:
        """Hold the running totals."""
        return Count()

    def use_cache(self, memory: Memory) -> None:
        """Look replies up in a cache from here on, and add new ones as they arrive; counts go on where the cache has some."""
        self.__dict__["_memory"] = memory
        if COUNT in memory:
            known = {f.name for f in fields(Count)}
            self.__dict__["count"] = Count(**{k: v for k, v in cast(dict[str, int], memory[COUNT]).items() if k in known})

    @functools.cached_property
    def _memory(self) -> Memory:
        return Forgetful()

    @functools.cached_property
    def _lock(self) -> threading.Lock:
        return threading.Lock()

    def cached(self, key: str) -> object:
        """Return the cached reply, or None."""
        return self._memory[key] if key in self._memory else None  # noqa: SIM401 (a memory has no get)

    def cache_reply(self, key: str, reply: object) -> None:
        """Cache a reply; may be called from several threads."""
        with self._lock:
            self._memory.add(key, reply)

    def keep_count(self) -> None:
        """Store the counts in a memory that outlasts the process; may be called from several threads."""
        self._keep({})

    def _keep(self, replies: Mapping[str, object]) -> None:
        """Store replies with the counts that include them."""
        counted = {} if isinstance(self._memory, Forgetful) else {COUNT: asdict(self.count)}
        if replies or counted:
            with self._lock:
                self._memory.add_together({**replies, **counted})

    def generate(self, requests: Sequence[Ask]) -> list[str | None]:
        """Return the judge's text for each request; None where it failed.

        Raises:
            RunError: the judge cannot be reached.
        """
        return self._through_memory("write", requests, (), self.write)

    def decide(self, requests: Sequence[Ask], options: Sequence[str]) -> list[Choice | None]:
        """Return the judge's choice for each request; None where it failed.

        Raises:
            RunError: the judge cannot be reached.
        """

        def fresh(part: Sequence[Ask]) -> Iterator[tuple[int, Any]]:
            for index, reply in self.choose(part, options):
                choice = _choice(reply)
                if choice is not None:
                    self.count.by_votes += choice.how == "votes"
                    self.count.by_logprobs += choice.how == "logprobs"
                yield index, None if choice is None else asdict(choice)

        found = self._through_memory("choice", requests, tuple(options), fresh)
        return [None if reply is None else Choice(**reply) for reply in found]

    def choice_logprobs(self, requests: Sequence[Ask], options: Sequence[str]) -> list[Logprobs | None]:
        """Return the log-probability of each option as the whole first word of the answer, (N, options); None where it failed.

        They are not normalised: the rest of the probability lies on other words. What is impossible is `LEAST`, so that every
        value is a finite number.

        Raises:
            RunError: the judge cannot be reached.
        """
        return [None if choice is None else choice.logprobs for choice in self.decide(requests, options)]

    def _through_memory(
        self,
        how: str,
        requests: Sequence[Ask],
        options: tuple[str, ...],
        fresh: Callable[[Sequence[Ask]], Iterator[tuple[int, object]]],
    ) -> list[Any]:
        keys = [ask.key(self.identity, how, options) for ask in requests]
        new = list(dict.fromkeys(k for k in keys if k not in self._memory))
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        self.count.remembered += len(requests) - len(new)
        for index, reply in fresh([requests[first[key]] for key in new]) if new else ():
            self.count.requested += 1
            self.count.failures += reply is None
            self._keep({} if reply is None else {new[index]: reply})
        return [self.cached(key) for key in keys]


def _choice(reply: Choice | Logprobs | None) -> Choice | None:
    if reply is None or isinstance(reply, Choice):
        return reply
    return Choice([max(value, LEAST) for value in reply], min(math.fsum(map(math.exp, reply)), 1.0))


def build_judge(body: object, where: str) -> Judge:
    """Build the judge of a mapping `{kind: NAME, option: value, ...}`, without running its own check.

    Raises:
        RecipeError: every mistake in it.
    """
    from llmrecipe.recipe.validate import build_component
    from llmrecipe.recipe.validate import build_object as build_object

    if isinstance(body, str):
        body = {"kind": body}
    if not isinstance(body, Mapping) or "kind" not in body:
        known = ", ".join(registry.names("judge"))
        raise RecipeError(f"{where}: must be a mapping with a kind, such as {{kind: rule}} (known: {known}); got {body!r}")
    return build_object("judge", build_component("judge", body, where), where)


def short_hash(*known: object) -> str:
    """Return an 8-hex-digit hash of JSON values."""
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:8]


def chunks(items: Sequence[Any], size: int) -> Iterable[tuple[int, Sequence[Any]]]:
    """Yield (index of the first, items) of each chunk of at most `size` items."""
    for first in range(0, len(items), size):
        yield first, items[first : first + size]
