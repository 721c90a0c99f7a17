"""A scorer behind HTTP as a reward."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from llmrecipe.core.errors import RunError
from llmrecipe.core.foreign import parse_json
from llmrecipe.core.http_client import Client, check_address
from llmrecipe.core.option_types import NonNegativeInt, PositiveFloat, PositiveInt
from llmrecipe.core.redact import variable_of
from llmrecipe.core.registry import register
from llmrecipe.objectives.reward_interface import Answer, Reward


@register
class Http(Reward):
    """Scores from a server: POST {"answers": [{"prompt", "answer", "columns"}, ...]} -> {"scores": [number or null, ...]}.

    Requests to a busy or broken server are repeated, each after twice the wait (or what `Retry-After` says); what it does not
    accept is an error at once. Plain HTTP or HTTPS.
    """

    url: str = ""
    """Address of the scorer."""
    batch: PositiveInt = 64
    """Answers in one request."""
    timeout: PositiveFloat = 30.0
    """Seconds to wait for a reply."""
    retries: NonNegativeInt = 4
    """Further attempts after a failure."""
    wait: PositiveFloat = 0.5
    """Seconds before the second attempt."""
    key: str | None = None
    """A bearer token, as `${oc.env:NAME}`: the token itself never enters a recipe."""
    key_env: str | None = None
    """The same as the name alone of that environment variable."""

    @functools.cached_property
    def client(self) -> Client:
        """Hold the connection, made on first use."""
        return Client(
            self.url, "reward server", "scores", variable_of(self.key) or self.key_env, self.timeout, self.retries, self.wait
        )

    def check(self, columns: Sequence[str], where: str) -> None:
        """Refuse a missing address, or a missing token where one is needed."""
        check_address(self.url, self.key, self.key_env, where)

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """Return the server's numbers.

        Raises:
            RunError: it refused, kept failing, or sent something else.
        """
        scores: list[float | None] = []
        for first in range(0, len(answers), self.batch):
            part = answers[first : first + self.batch]
            body = {"answers": [{"prompt": a.prompt, "answer": a.text, "columns": dict(a.columns)} for a in part]}
            reply = self.client.post(body)
            scores += self._numbers(reply, len(part))
        return scores

    def _numbers(self, reply: bytes, count: int) -> list[float | None]:
        try:
            scores = parse_json(reply)["scores"]
            numbers = [None if s is None else float(s) for s in scores]
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            wanted = f'reward server {self.url}: the reply is not {{"scores": [numbers]}}: {reply[:200]!r}'
            raise RunError(self.client.clean(wanted)) from error
        if len(numbers) != count:
            wanted = f"{len(numbers)} scores for {count} answers; got {reply[:200]!r}"
            raise RunError(self.client.clean(f"reward server {self.url}: {wanted}"))
        return numbers
