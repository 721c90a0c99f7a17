"""Requests of the OpenAI API: chat completions and completions, checked key by key.

Keys that change the answer and that this server has no counterpart for are refused, unless they say what is the case anyway;
keys that are notes of the client (user, metadata, ...) are dropped.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmrecipe.core.errors import did_you_mean
from llmrecipe.core.foreign import parse_json
from llmrecipe.core.printable import shortened
from llmrecipe.evaluation.serving.api_error import ApiError

NOTES = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls", "prediction"}
)
"""Keys without an effect on the answer."""
WITHOUT: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
"""Keys that are not supported -> the values that ask for nothing; null always does."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Role of a message -> the role its template knows."""


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False


class _Request(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1, le=8)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def tokens_wanted(self) -> int | None:
        """Return the limit of new tokens that the request names."""
        return self.max_tokens

    def stops(self) -> list[str]:
        """Return the texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(_Request):
    """A request for the next turn of a conversation."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def tokens_wanted(self) -> int | None:
        """Return the limit of new tokens; the newer of the two keys counts."""
        return self.max_completion_tokens or self.max_tokens

    def turns(self) -> list[dict[str, Any]]:
        """Return the conversation as chat templates read it.

        Raises:
            ApiError: a part of a message is no text.
        """
        turns = []
        for number, message in enumerate(self.messages):
            content = message.content if message.content is not None else ""
            if isinstance(content, list):
                content = "".join(_text_part(part, f"messages.{number}.content.{i}") for i, part in enumerate(content))
            turns.append({**(message.model_extra or {}), "role": ROLES[message.role], "content": content})
        return turns


class CompletionRequest(_Request):
    """A request for the continuation of a text, or of token ids."""

    prompt: str | list[str] | list[int] | list[list[int]]

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one.

        Raises:
            ApiError: there is none.
        """
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if not given:
            raise ApiError(400, "prompt: an empty list; give a text, texts, or token ids", "prompt")
        if isinstance(given[0], int):
            return [[int(token) for token in given]]
        return list(given)


R = TypeVar("R", bound=_Request)


def _text_part(part: dict[str, Any], where: str) -> str:
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ApiError(400, f"{where}: only parts of type 'text' are read here; got {part.get('type')!r:.80}", where)


def read_request(body: bytes, kind: type[R]) -> R:
    """Parse the body of a request.

    Raises:
        ApiError: it is not JSON, or a key is wrong; the message names it.
    """
    try:
        content = parse_json(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {shortened(str(error), 200)}", code="invalid_json") from error
    if not isinstance(content, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(content).__name__}", code="invalid_json")
    known = {}
    for key, value in content.items():
        if key in NOTES:
            continue
        if key in WITHOUT and key not in kind.model_fields:
            if value is not None and value not in WITHOUT[key]:
                raise ApiError(400, f"{key}: not supported by this server; leave it out", key, "unsupported_parameter")
            continue
        known[key] = value
    try:
        request = kind.model_validate(known)
    except ValidationError as error:
        raise _named(error, kind) from None
    if len(request.stops()) > 4 or any(not stop or len(stop) > 1000 for stop in request.stops()):
        raise ApiError(400, "stop: at most 4 texts, none of them empty or longer than 1000 characters", "stop")
    return request


def _named(error: ValidationError, kind: type[_Request]) -> ApiError:
    """Return the first of the wrong keys as an error."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{key}: there is no such key{did_you_mean(key, kind.model_fields)}", key, "unknown_parameter")
    given = "" if first["type"] == "missing" else f"; got {shortened(repr(first['input']), 80)}"
    return ApiError(400, f"{key}: {first['msg']}{given}", key)
