"""A run, or several on one base, that answers the requests of a server, one request at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmrecipe.core.errors import UserError, did_you_mean
from llmrecipe.data.tokenize.call_tokenizer import call_tokenizer
from llmrecipe.data.tokenize.chat_templates import prompt_ids
from llmrecipe.engine.answer_ends import answer_ends
from llmrecipe.engine.sampling import Sampling
from llmrecipe.evaluation.chat import Chat
from llmrecipe.evaluation.serving.api_error import ApiError
from llmrecipe.evaluation.serving.text_stream import TextStream, cleans_spaces
from llmrecipe.models.positions import stated_positions
from llmrecipe.models.vocabulary import input_embedding
from llmrecipe.runs.run_names import run_title

STOP, LENGTH = "stop", "length"


@dataclass(frozen=True)
class Limits:
    """What one request may use."""

    tokens: int = 1024
    """Most new tokens of one answer."""
    seconds: float = 300.0
    """Longest time of a request, waiting included."""
    requests: int = 16
    """Requests answered or waiting at once."""
    body: int = 1 << 20
    """Bytes of a request."""
    arrival: float = 30.0
    """Seconds in which a request must have arrived."""


@dataclass(eq=False)
class AnswerJob:
    """One request on its way."""

    model: str
    prompts: list[list[int]]
    """Token ids of each prompt."""
    sampling: Sampling
    """How tokens are picked, and the stop texts."""
    stripped: bool
    """Whether white space around the answer is taken off, as `llmrecipe chat` does."""
    deadline: float
    """Of `time.monotonic`."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set when nobody waits for the answer any more."""


@dataclass(frozen=True)
class Ended:
    """How an answer ended."""

    reason: str
    """`stop` or `length`."""
    tokens: int


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


class _AnswerEnded(Exception):
    """An end token or a stop text ended the answer."""


class ServedModel:
    """Answers jobs under the template of the run; `answer` is called from one thread, the rest from another.

    Args:
        chat: the model with its adapters.
        path: the run it was opened from; its title is the model's name where there are no adapters.
    """

    def __init__(self, chat: Chat, path: str):
        self.chat, self.tokenizer = chat, chat.loaded.tokenizer
        single = run_title(Path(path).resolve()) if Path(path).exists() else path
        self.names = list(chat.adapters.choices) if chat.adapters is not None else [single]
        self.created = int(time.time())
        self.positions = stated_positions(chat.loaded.model.config)
        self.vocabulary = int(getattr(input_embedding(chat.loaded.model), "num_embeddings", 0))
        self._tokenizing = threading.Lock()

    def name(self, given: str) -> str:
        """Return a model's name.

        Raises:
            ApiError: there is none of that name.
        """
        if given not in self.names:
            served = ", ".join(self.names)
            text = f"model: there is no '{given:.80}'{did_you_mean(given[:80], self.names)} (served here: {served})"
            raise ApiError(404, text, "model", "model_not_found")
        return given

    def ids_of_turns(self, turns: list[dict[str, Any]]) -> list[int]:
        """Return the token ids of a conversation up to the next answer.

        Raises:
            ApiError: the template refuses the conversation.
        """
        try:
            with self._tokenizing:
                return prompt_ids(self.tokenizer, turns)
        except UserError as error:
            raise ApiError(400, f"messages: {error}", "messages") from error

    def ids_of_prompt(self, prompt: str | list[int]) -> list[int]:
        """Return the token ids of a prompt, which is text or ids.

        Raises:
            ApiError: an id that the vocabulary does not have, or a text that the tokenizer cannot encode.
        """
        if isinstance(prompt, str):
            try:
                with self._tokenizing:
                    return list(call_tokenizer(self.tokenizer, prompt)["input_ids"])
            except UserError as error:
                raise ApiError(400, f"prompt: {error}", "prompt") from error
        if wrong := [token for token in prompt if not 0 <= token < self.vocabulary]:
            raise ApiError(400, f"prompt: there is no token {wrong[0]}; ids are 0 to {self.vocabulary - 1}", "prompt")
        return prompt

    def room(self, prompts: Sequence[Sequence[int]], wanted: int | None, limits: Limits) -> int:
        """Return the limit of new tokens of a request.

        Args:
            wanted: the limit the request names; None takes what there is.

        Raises:
            ApiError: a prompt is empty, or prompt and answer do not fit.
        """
        longest = max(map(len, prompts))
        if not all(prompts):
            raise ApiError(400, "the prompt has no token; give it text", "prompt")
        left = limits.tokens if self.positions is None else min(limits.tokens, self.positions - longest)
        if left < 1:
            text = f"the prompt has {longest} tokens, and the model reads {self.positions} with the answer; shorten it"
            raise ApiError(400, text, "messages", "context_length_exceeded")
        if wanted is not None and wanted > left:
            text = (
                f"max_tokens: at most {left} for this prompt of {longest} tokens (the model reads "
                f"{self.positions or 'any number'}, the server gives at most {limits.tokens}); got {wanted}"
            )
            raise ApiError(400, text, "max_tokens", "context_length_exceeded")
        return wanted or left

    def answer(self, job: AnswerJob, prompt: list[int], key: int, emit: Callable[[str], None]) -> Ended:
        """Answer one prompt, and hand every piece of text to `emit` as soon as it is certain.

        Args:
            key: name of the answer's random stream.

        Raises:
            Cancelled: nobody waits any more.
            ApiError: the time is up.
        """
        ends = answer_ends(self.chat.loaded.model, self.tokenizer, job.sampling).tokens
        stream = TextStream(self._text, job.sampling.stop, cleans_spaces(self.tokenizer), job.stripped)
        reason = LENGTH

        def report(_: int, token: int) -> None:
            check_wanted(job)
            if piece := stream.feed(token):
                emit(piece)
            if stream.stopped or token in ends:
                raise _AnswerEnded

        check_wanted(job)
        try:
            # `report` finds stop texts as it decodes, under the lock that the tokenizer needs.
            for _ in self.chat.decoded(prompt, job.model, replace(job.sampling, stop=()), key, report):
                pass
        except _AnswerEnded:
            reason = STOP
        if piece := stream.close():
            emit(piece)
        return Ended(reason, len(stream.tokens))

    def _text(self, ids: Sequence[int]) -> str:
        with self._tokenizing:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def check_wanted(job: AnswerJob) -> None:
    """Go on with a job, or not.

    Raises:
        Cancelled: nobody waits any more.
        ApiError: the time is up.
    """
    if job.cancelled.is_set():
        raise Cancelled
    if time.monotonic() > job.deadline:
        raise ApiError(504, "the answer took longer than this server allows (--timeout); lower max_tokens", code="timeout")
