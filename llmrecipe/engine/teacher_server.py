"""A teacher behind HTTP: the likeliest tokens at every position of a prompt."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from llmrecipe.core.errors import RunError
from llmrecipe.core.foreign import parse_json
from llmrecipe.core.http_client import Client
from llmrecipe.data.collate import Sequence
from llmrecipe.engine.teacher import TopTokens

PATH = "/completions"
CONCURRENCY = 8
"""Requests under way at once."""


class TeacherServer:
    """A model behind an OpenAI-compatible server that knows `prompt_logprobs` (vLLM): POST URL/completions with token ids.

    The reply holds {token id: {"logprob": number}} for every position of the prompt but the first, at temperature 1.

    Args:
        key_env: environment variable with a bearer token.
    """

    def __init__(self, url: str, model: str, key_env: str | None = None):
        self.url, self.model = url, model
        self.client = Client(url, "teacher", "log-probabilities", key_env, timeout=120.0)

    def top(self, sequences: Seq[Sequence], count: int, temperature: float) -> list[TopTokens]:
        """Return the likeliest tokens at the targets of each sequence; the temperature is 1."""
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            return list(pool.map(lambda s: self._one(s, count), sequences))

    def _one(self, sequence: Sequence, count: int) -> TopTokens:
        wanted = [i for i, mark in enumerate(sequence.trained) if mark and i]
        ids, logprobs = torch.zeros(len(wanted), count, dtype=torch.long), torch.zeros(len(wanted), count)
        if not wanted:
            return TopTokens(ids, logprobs)
        body = {"model": self.model, "prompt": list(sequence.ids), "max_tokens": 1, "prompt_logprobs": count}
        reply = self.client.post(body, PATH)
        try:
            found: list[Any] = parse_json(reply)["choices"][0]["prompt_logprobs"]
            for row, at in enumerate(wanted):
                listed = sorted(((float(v["logprob"]), -int(token)) for token, v in found[at].items()), reverse=True)[:count]
                logprobs[row] = torch.tensor([value for value, _ in listed])
                ids[row] = torch.tensor([-token for _, token in listed])
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError) as error:
            text = (
                f"teacher {self.url}: the reply has no {count} log-probabilities by token id at every position of the prompt "
                f"(choices[0].prompt_logprobs, as vLLM gives them); got {reply[:200]!r}"
            )
            raise RunError(self.client.clean(text)) from error
        return TopTokens(ids, logprobs)
