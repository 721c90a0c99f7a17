"""The HTTP interface: `/v1/models`, `/v1/chat/completions` and `/v1/completions` of the OpenAI API.

Requests are checked here, in the event loop; answers come from one thread that decodes one request after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import re
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llmrecipe.core.console import say_aside
from llmrecipe.core.errors import UserError
from llmrecipe.core.foreign import reason_of
from llmrecipe.engine.sampling import Sampling
from llmrecipe.evaluation.serving.api_error import ApiError
from llmrecipe.evaluation.serving.requests import ChatRequest, CompletionRequest, read_request
from llmrecipe.evaluation.serving.served_model import AnswerJob, Cancelled, Ended, Limits, ServedModel, check_wanted

PORT = re.compile(r":\d+$")
DRAINED = 16
"""How many times the largest body is read and dropped, so that the client reads why it is refused."""
GRACE = 1.0
"""Seconds after the deadline in which the decoding thread itself reports that the time is up."""
AnyRequest = ChatRequest | CompletionRequest


@dataclass(frozen=True)
class AnswerPiece:
    """A piece of the text of one answer, or its end."""

    index: int
    text: str = ""
    ended: Ended | None = None


class Answers:
    """The thread that decodes, and the requests that wait for it."""

    def __init__(self, model: ServedModel, limits: Limits):
        self.model, self.limits = model, limits
        self.closing = False
        self._pool = ThreadPoolExecutor(1, "decoding")
        self._free = threading.BoundedSemaphore(limits.requests)
        self._jobs: set[AnswerJob] = set()

    def close(self) -> None:
        """End what is being answered and let nothing begin."""
        self.closing = True
        for job in list(self._jobs):
            job.cancelled.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def pieces(self, job: AnswerJob, copies: int) -> AsyncGenerator[AnswerPiece, None]:
        """Yield the pieces of `copies` answers to each prompt of a job, answer by answer.

        Raises:
            ApiError: too many requests wait, the server is being stopped, or the time is up.
        """
        if self.closing:
            raise ApiError(503, "the server is being stopped")
        if not self._free.acquire(blocking=False):
            text = f"{self.limits.requests} requests are answered or waiting (--concurrency); try again"
            raise ApiError(429, text, code="rate_limit_exceeded")
        loop, found = asyncio.get_running_loop(), asyncio.Queue[AnswerPiece | BaseException | None]()

        def put(item: AnswerPiece | BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(found.put_nowait, item)

        self._jobs.add(job)
        self._pool.submit(self._work, job, copies, put).add_done_callback(lambda _: self._free.release())
        try:
            while True:
                try:
                    item = await asyncio.wait_for(found.get(), max(0.0, job.deadline - time.monotonic()) + GRACE)
                except TimeoutError:
                    check_wanted(job)
                    continue
                if item is None:
                    return
                if isinstance(item, Cancelled):
                    raise ApiError(503, "the server is being stopped")
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            job.cancelled.set()
            self._jobs.discard(job)

    def _work(self, job: AnswerJob, copies: int, put: Callable[[AnswerPiece | BaseException | None], None]) -> None:
        try:
            for number, prompt in enumerate(job.prompts):
                for copy in range(copies):
                    index = number * copies + copy
                    ended = self.model.answer(job, prompt, copy, lambda text, index=index: put(AnswerPiece(index, text)))  # type: ignore[misc]
                    put(AnswerPiece(index, ended=ended))
        except BaseException as error:  # whatever it is, the waiting request has to hear of it
            put(error)
        else:
            put(None)


class _Stream(StreamingResponse):
    """A stream of events whose source is closed when the client leaves."""

    media_type = "text/event-stream"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            source: Any = self.body_iterator
            await source.aclose()


class Api:
    """The endpoints.

    Args:
        key: the bearer token that requests must carry; None takes all.
        hosts: names of this server that requests may use; None takes any.
    """

    def __init__(self, model: ServedModel, limits: Limits, key: str | None = None, hosts: frozenset[str] | None = None):
        self.model, self.limits, self.key, self.hosts = model, limits, key, hosts
        self.answers = Answers(model, limits)

    def app(self) -> Starlette:
        """Return the application."""
        return Starlette(
            routes=[
                Route("/health", self.health),
                Route("/v1/models", self._guarded(self.models)),
                Route("/v1/models/{name:path}", self._guarded(self.one_model)),
                Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
                Route("/v1/completions", self._guarded(self.completions), methods=["POST"]),
            ],
            exception_handlers={ApiError: _refused, HTTPException: _not_found, Exception: _failed},
        )

    def _guarded(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            self._check_caller(request)
            return await endpoint(request)

        return guarded

    def _check_caller(self, request: Request) -> None:
        """Check host and key.

        A page of the web whose name is pointed at this machine sends its own name as the host, and nothing but JSON is read,
        which a page of another origin cannot send.
        """
        host = PORT.sub("", request.headers.get("host", ""))
        if self.hosts is not None and host not in self.hosts:
            raise ApiError(421, f"this server answers to {', '.join(sorted(self.hosts))} only")
        if self.key is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
                raise ApiError(401, "wrong or missing API key: send 'Authorization: Bearer KEY'", code="invalid_api_key")

    async def health(self, request: Request) -> Response:
        """Say that the server is up."""
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """List the models: the run, or each of its adapters."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.model.names]})

    async def one_model(self, request: Request) -> Response:
        """Describe one model."""
        return JSONResponse(self._model(self.model.name(request.path_params["name"])))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.model.created, "owned_by": "llmrecipe"}

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        given = read_request(await self._body(request), ChatRequest)
        name = self.model.name(given.model)
        return await self._reply(request, given, name, [self.model.ids_of_turns(given.turns())])

    async def completions(self, request: Request) -> Response:
        """Continue a text, or several."""
        given = read_request(await self._body(request), CompletionRequest)
        name = self.model.name(given.model)
        prompts = [self.model.ids_of_prompt(prompt) for prompt in given.prompts()]
        return await self._reply(request, given, name, prompts)

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"send JSON with 'Content-Type: application/json'; got {kind[:80]!r}")
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(self.limits.arrival):
                async for part in request.stream():
                    size += len(part)
                    if size <= self.limits.body:
                        body += part
                    elif size > DRAINED * self.limits.body:
                        break
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {self.limits.arrival:g} s", code="timeout") from None
        if size > self.limits.body:
            raise ApiError(413, f"the request is larger than {self.limits.body:,} bytes", code="request_too_large")
        return bytes(body)

    async def _reply(self, request: Request, given: AnyRequest, name: str, prompts: list[list[int]]) -> Response:
        new = self.model.room(prompts, given.tokens_wanted(), self.limits)
        hot = 1.0 if given.temperature is None else given.temperature
        sampling = Sampling(new, hot, given.top_p or 1.0, given.top_k or 0, 1, _seed(given.seed), tuple(given.stops()))
        deadline = time.monotonic() + self.limits.seconds
        job = AnswerJob(name, prompts, sampling, isinstance(given, ChatRequest), deadline)
        pieces = self.answers.pieces(job, given.n or 1)
        form = _Form(given, name, sum(map(len, prompts)))
        if given.stream:
            # What can be refused is refused before the status is sent.
            first = await anext(pieces)
            return _Stream(_events(form, first, pieces), headers={"Cache-Control": "no-store"})
        texts: dict[int, list[str]] = {}
        ends: dict[int, Ended] = {}
        try:
            async for piece in pieces:
                texts.setdefault(piece.index, []).append(piece.text)
                if piece.ended is not None:
                    ends[piece.index] = piece.ended
                if await request.is_disconnected():
                    raise ClientDisconnect
        finally:
            await pieces.aclose()
        return JSONResponse(form.whole({index: "".join(parts) for index, parts in texts.items()}, ends))


class _Form:
    """The bodies of the replies to one request."""

    def __init__(self, given: AnyRequest, name: str, prompt_tokens: int):
        self.given, self.prompt_tokens = given, prompt_tokens
        self.chat = isinstance(given, ChatRequest)
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": name,
        }

    def whole(self, texts: dict[int, str], ends: dict[int, Ended]) -> dict[str, Any]:
        """Return the reply with the whole answers."""
        choices: list[dict[str, Any]] = []
        for index, text in sorted(texts.items()):
            said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": ends[index].reason})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": self.usage(list(ends.values()))}

    def part(self, piece: AnswerPiece, first: bool) -> dict[str, Any]:
        """Return one event of a stream; `first` is the first piece of its answer."""
        said: dict[str, Any] = {"text": piece.text}
        if self.chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            said = {"delta": {**delta, **({"content": piece.text} if piece.text or first else {})}}
        reason = piece.ended.reason if piece.ended is not None else None
        return self.event([{"index": piece.index, **said, "logprobs": None, "finish_reason": reason}])

    def event(self, choices: list[dict[str, Any]], **more: object) -> dict[str, Any]:
        """Return an event."""
        return {**self.head, "object": "chat.completion.chunk" if self.chat else "text_completion", "choices": choices, **more}

    def usage(self, ends: list[Ended]) -> dict[str, int]:
        """Return the numbers of tokens."""
        new = sum(ended.tokens for ended in ends)
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": new, "total_tokens": self.prompt_tokens + new}


async def _events(form: _Form, first: AnswerPiece, pieces: AsyncGenerator[AnswerPiece, None]) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream; an error after the first of them is an event of its own."""
    seen: set[int] = set()
    ends: list[Ended] = []
    try:
        piece: AnswerPiece | None = first
        while piece is not None:
            yield _line(form.part(piece, piece.index not in seen))
            seen.add(piece.index)
            ends += [] if piece.ended is None else [piece.ended]
            piece = await anext(pieces, None)
        options = form.given.stream_options
        if options is not None and options.include_usage:
            yield _line(form.event([], usage=form.usage(ends)))
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield _line(error.body())
    except Exception as error:  # the status is sent; the client has to hear of it all the same
        yield _line(_as_api_error(error).body())
    finally:
        await pieces.aclose()


def _line(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def _seed(given: int | None) -> int | None:
    return None if given is None else given % 2**63


def _as_api_error(error: Exception) -> ApiError:
    """Return an unforeseen error as one for the client, and report it on stderr."""
    say_aside(f"serve: {type(error).__name__}: {reason_of(error)}")
    return ApiError(500, str(error) if isinstance(error, UserError) else "the server failed; its log names the reason")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"Retry-After": "1"} if error.status == 429 else {}
    if error.status in (408, 413, 415, 421):  # what is left of the body is not read
        headers["Connection"] = "close"
    return JSONResponse(error.body(), error.status, headers)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path[:200]}: there is /v1/models, /v1/chat/completions and /v1/completions"
    return JSONResponse(ApiError(error.status_code, text, code="not_found").body(), error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse(_as_api_error(error).body(), 500)
