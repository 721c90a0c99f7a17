"""A scorer behind HTTP as a reward."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

from llmrecipe.errors import RecipeError, RunError
from llmrecipe.fields import NonNegativeInt, PositiveFloat, PositiveInt
from llmrecipe.registry import register
from llmrecipe.rewards.reward import Answer, Reward

BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Answers of a server that may go better a moment later."""


@register
class Http(Reward):
    """Scores from a server: POST {"answers": [{"prompt", "answer", "columns"}, ...]} -> {"scores": [number, ...]}.

    A busy or broken server is asked again, each time after twice the wait (or what `Retry-After` says); what it does not
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
    key_env: str | None = None
    """Environment variable with a bearer token; the token itself never enters a recipe."""

    def check(self, columns: Sequence[str], where: str) -> None:
        """The address, and the token where one is wanted."""
        if not self.url.startswith(("http://", "https://")):
            raise RecipeError(f"{where}.url: must be an address such as http://localhost:8000/score; got {self.url!r}")
        if self.key_env is not None and not os.environ.get(self.key_env):
            raise RecipeError(f"{where}.key_env: the environment variable {self.key_env} is not set")

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """The server's numbers.

        Raises:
            RunError: it refused, kept failing, or sent something else.
        """
        scores: list[float] = []
        for first in range(0, len(answers), self.batch):
            part = answers[first : first + self.batch]
            body = {"answers": [{"prompt": a.prompt, "answer": a.text, "columns": dict(a.columns)} for a in part]}
            reply = self._ask(json.dumps(body, default=str).encode())
            scores += self._numbers(reply, len(part))
        return scores

    def _ask(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.key_env]}"
        trouble = ""
        for attempt in range(self.retries + 1):
            pause = self.wait * 2**attempt
            try:
                with urllib.request.urlopen(urllib.request.Request(self.url, body, headers), timeout=self.timeout) as reply:
                    return reply.read()
            except urllib.error.HTTPError as error:
                trouble = f"status {error.code}"
                if error.code not in BUSY:
                    raise RunError(f"reward server {self.url}: {trouble}: {error.read(200)!r}") from error
                after = error.headers.get("Retry-After", "")
                pause = float(after) if after.isdigit() else pause
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                trouble = str(getattr(error, "reason", error))
            if attempt < self.retries:
                time.sleep(pause)
        raise RunError(f"reward server {self.url}: no scores after {self.retries + 1} attempts; the last: {trouble}")

    def _numbers(self, reply: bytes, count: int) -> list[float]:
        try:
            scores = json.loads(reply)["scores"]
            numbers = [float(s) for s in scores]
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(f'reward server {self.url}: the reply is not {{"scores": [numbers]}}: {reply[:200]!r}') from error
        if len(numbers) != count or any(n != n or abs(n) == float("inf") for n in numbers):
            raise RunError(
                f"reward server {self.url}: {len(numbers)} finite scores wanted for {count} answers; got {reply[:200]!r}"
            )
        return numbers
