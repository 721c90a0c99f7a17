"""HTTP client: JSON in, JSON text out, with retries for a busy server and without leaking secrets.

Secrets are removed from every part of a request or reply that enters a message: the bearer token, secret values of the
environment, the user and password of an address.
"""

from __future__ import annotations

import email.utils
import functools
import json
import os
import random
import re
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.core.redact import HIDDEN, name_variable, redact_text, variable_of

BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Status codes of a server that may succeed on a later attempt."""
LONGEST_WAIT = 120.0
"""Longest wait in seconds before the next attempt, whatever the server requests."""


UNSENDABLE = "a line end, white space around it, or a character that no header can carry"
"""What is wrong with a key that is no token."""
LARGEST_REPLY = 64 << 20
"""Bytes of the largest reply that is read."""


class Reply(NamedTuple):
    """What a server answered."""

    status: int
    retry_after: str
    body: bytes
    """At most one byte more than `LARGEST_REPLY`."""


class Refused(RunError):
    """The server rejected this request, and sending it again would not help.

    Attributes:
        code: the HTTP status.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Unreadable(RunError):
    """The server answered each attempt, but never with a valid reply."""


def check_address(url: str, key: str | None, key_env: str | None, where: str) -> None:
    """Refuse an address or key that cannot be used, before anything is loaded.

    Args:
        key: `${oc.env:NAME}`.
        key_env: NAME.
        where: key path for messages; no secret is ever repeated there.

    Raises:
        RecipeError: the address is invalid or contains a secret, the key is written out, or its variable is not set.
    """
    named = f"name the environment variable that holds it: {where}.key=\\${{oc.env:NAME}} or {where}.key_env=NAME"
    if key is not None and variable_of(key) is None:
        raise RecipeError(f"{where}.key: do not write a key into a recipe; {named}")
    if key is not None and key_env is not None:
        raise RecipeError(f"{where}.key_env: the key is given twice, by key and by key_env; keep one")
    if "@" in re.split("[/?#]", url.partition("://")[2], maxsplit=1)[0]:
        raise RecipeError(f"{where}.url: do not write a user and password into an address; {named}")
    if not _is_address(url):
        raise RecipeError(f"{where}.url: must be an address such as http://localhost:8000/v1; got {url!r}")
    variable = variable_of(key) or key_env
    name_variable(variable)
    if variable is not None and not os.environ.get(variable):
        raise RecipeError(f"{where}.{'key' if key else 'key_env'}: the environment variable {variable} is not set")
    if variable is not None and not _is_token(os.environ[variable]):
        raise RecipeError(
            f"{where}.{'key' if key else 'key_env'}: the environment variable {variable} holds {UNSENDABLE}; set it again "
            "without (a file with Windows line ends is the usual reason)"
        )


def _is_address(url: str) -> bool:
    """Return whether a text is an HTTP address with a host and, if any, a valid port."""
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _is_token(value: str) -> bool:
    """Return whether a header can carry a value."""
    return value.isascii() and value.isprintable() and value == value.strip()


@dataclass
class Client:
    """One server. `post` may be called from several threads.

    A request to a busy or failing server is retried; the delay doubles with each attempt, times a random factor between 0.5
    and 1.5. `Retry-After`, in seconds or as a date, is obeyed instead where it is given.
    """

    url: str
    who: str
    """Name of the server in messages."""
    what: str
    """Name of the requested thing in messages."""
    key_env: str | None = None
    """Environment variable with a bearer token."""
    timeout: float = 30.0
    """Seconds for a whole request, from connecting to the last byte of the reply."""
    retries: int = 4
    """Number of retries after a failure."""
    wait: float = 0.5
    """Seconds before the second attempt."""
    per_minute: int | None = None
    """Maximum number of requests per minute, retries included."""
    accept: Callable[[bytes], str | None] | None = None
    """Returns what is wrong with a reply, or None; an invalid reply counts as a failure and is retried."""
    requests: int = 0
    """Requests sent so far, retries included."""
    _next: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _random: random.Random = field(default_factory=random.Random)

    def post(self, body: object, path: str = "") -> bytes:
        """Send one JSON body and return the reply.

        Raises:
            Refused: the server answered with a status that a retry cannot change.
            Unreadable: `accept` rejected the last reply.
            RunError: all attempts failed.
        """
        content = json.dumps(body, default=str).encode()
        trouble, answered = "", False
        for attempt in range(self.retries + 1):
            pause = self.wait * 2**attempt * self._random.uniform(0.5, 1.5)
            self._wait_for_turn()
            try:
                reply = self._send(content, path)
            except OSError as error:
                trouble, answered = str(error), False
            else:
                answered = 200 <= reply.status < 300
                wrong = self.accept(reply.body) if answered and self.accept is not None else None
                if answered and wrong is None:
                    return reply.body
                trouble = wrong or f"status {reply.status}"
                if not answered and reply.status not in BUSY:
                    said = f"{self.who} {self.url}: {trouble}: {reply.body[:200]!r}"
                    raise Refused(self.clean(said), reply.status)
                pause = pause if answered else retry_after(reply.retry_after, pause)
            if attempt < self.retries:
                time.sleep(pause)
        text = f"{self.who} {self.url}: no {self.what} after {self.retries + 1} attempts; the last: {trouble}"
        raise (Unreadable if answered else RunError)(self.clean(text))

    def clean(self, text: str) -> str:
        """Return the text without this client's key and other secrets."""
        name_variable(self.key_env)
        key = self._key()
        return redact_text(text.replace(key, HIDDEN) if key else text)

    def _key(self) -> str:
        return os.environ.get(self.key_env, "") if self.key_env is not None else ""

    def _send(self, content: bytes, path: str) -> Reply:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if key := self._key():
            if not _is_token(key):
                raise RunError(f"{self.who}: the environment variable {self.key_env} holds {UNSENDABLE}; set it again")
            headers["Authorization"] = f"Bearer {key}"
        with self._lock:
            self.requests += 1
        reply = exchange(self.url.rstrip("/") + path if path else self.url, content, headers, self.timeout)
        if len(reply.body) > LARGEST_REPLY:
            raise RunError(f"{self.who} {self.url}: the reply is larger than {LARGEST_REPLY >> 20} MB: {reply.body[:80]!r}")
        return reply

    def _wait_for_turn(self) -> None:
        """Wait until the rate allows one more request."""
        if self.per_minute is None:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + 60.0 / self.per_minute
        time.sleep(turn - now)


def retry_after(value: str, otherwise: float) -> float:
    """Return the seconds to wait given by a `Retry-After` header (a number or an HTTP date), at most `LONGEST_WAIT`."""
    value = value.strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return otherwise
    return min(max(seconds, 0.0), LONGEST_WAIT) if seconds == seconds else otherwise


def exchange(url: str, content: bytes, headers: dict[str, str], timeout: float) -> Reply:
    """Send one request and return the reply, within `timeout` seconds from the first byte sent to the last received.

    A redirect is a reply like any other: the token is for the given address and for no other. The request runs on an event
    loop in a thread of its own, because only there does a deadline end a reply that arrives a byte at a time, and because
    the caller may be inside a running event loop, as in a notebook.

    Raises:
        OSError: no connection, no valid HTTP, or no whole reply in time.
    """
    import anyio
    import anyio.from_thread
    import httpx

    async def send() -> Reply:
        with anyio.fail_after(timeout):
            async with (
                httpx.AsyncClient(verify=_certificates(), timeout=None, follow_redirects=False) as client,
                client.stream("POST", url, content=content, headers=headers) as reply,
            ):
                body = bytearray()
                async for part in reply.aiter_raw():
                    body += part
                    if len(body) > LARGEST_REPLY:
                        break
                return Reply(reply.status_code, reply.headers.get("Retry-After", ""), bytes(body[: LARGEST_REPLY + 1]))

    try:
        with anyio.from_thread.start_blocking_portal() as portal:
            return portal.call(send)
    except TimeoutError:
        raise OSError(f"no whole reply within {timeout:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise OSError(_reason(error)) from None


def _reason(error: BaseException) -> str:
    """Return the message of the first cause, such as a refused connection, which says most."""
    reason = str(error) or type(error).__name__
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else cause
        reason = str(error) or reason
    return reason


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Return the certificates that this machine trusts."""
    return ssl.create_default_context()
