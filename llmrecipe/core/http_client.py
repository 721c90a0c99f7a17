"""HTTP client: JSON in, JSON text out, with retries for a busy server and without leaking secrets.

Secrets are removed from every part of a request or reply that enters a message: the bearer token, secret values of the
environment, the user and password of an address.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import io
import json
import os
import random
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.core.redact import HIDDEN, name_variable, redact_text, variable_of

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Status codes of a server that may succeed on a later attempt."""
LONGEST_WAIT = 120.0
"""Longest wait in seconds before the next attempt, whatever the server requests."""


UNSENDABLE = "a line end, white space around it, or a character that no header can carry"
"""What is wrong with a key that is no token."""
LARGEST_REPLY = 64 << 20
"""Bytes of the largest reply that is read."""


class _Reader(io.RawIOBase):
    """Reads a socket until a deadline: a timeout of the socket alone would begin again with each byte."""

    def __init__(self, sock: socket.socket, deadline: float, timeout: float):
        self.sock, self.deadline, self.timeout = sock, deadline, timeout

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Read into a buffer what has arrived."""
        left = self.deadline - time.monotonic()
        if left > 0:
            self.sock.settimeout(left)
            with contextlib.suppress(TimeoutError):
                return self.sock.recv_into(buffer)
        raise TimeoutError(f"no whole reply within {self.timeout:g} s")

    def close(self) -> None:
        """Close the socket."""
        super().close()
        self.sock.close()


class _Socket:
    """A socket whose reader has a deadline; the reader closes it."""

    def __init__(self, sock: socket.socket, timeout: float):
        self._sock, self._timeout, self._deadline = sock, timeout, time.monotonic() + timeout
        self._read = False

    def makefile(self, mode: str, *_: object) -> io.BufferedReader:
        """Return the reader."""
        self._read = True
        return io.BufferedReader(_Reader(self._sock, self._deadline, self._timeout))

    def close(self) -> None:
        """Close the socket unless a reader has it."""
        if not self._read:
            self._sock.close()

    def __getattr__(self, name: str) -> object:
        return getattr(self._sock, name)


class _Plain(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        self.sock: Any = _Socket(self.sock, float(self.timeout or LONGEST_WAIT))


class _Secure(http.client.HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        self.sock: Any = _Socket(self.sock, float(self.timeout or LONGEST_WAIT))


class _Handler(urllib.request.HTTPHandler):
    """Opens addresses with connections whose replies have a deadline."""

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Plain, request)


class _SecureHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Secure, request)


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: the token is for the given address and for no other."""

    def redirect_request(self, *_: object) -> None:
        """Return None, which leaves the reply an HTTP error."""
        return


OPENER = urllib.request.build_opener(_StayHere, _Handler, _SecureHandler)


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
    if "@" in urllib.parse.urlsplit(url).netloc:
        raise RecipeError(f"{where}.url: do not write a user and password into an address; {named}")
    if not url.startswith(("http://", "https://")):
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
    """Seconds to connect, and seconds for a whole reply."""
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
                wrong = self.accept(reply) if self.accept is not None else None
                if wrong is None:
                    return reply
                trouble, answered = wrong, True
            except urllib.error.HTTPError as error:
                trouble, answered = f"status {error.code}", False
                if error.code not in BUSY:
                    raise Refused(self.clean(f"{self.who} {self.url}: {trouble}: {_start(error)!r}"), error.code) from None
                pause = retry_after(error.headers.get("Retry-After", ""), pause)
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                trouble, answered = str(getattr(error, "reason", "") or error) or type(error).__name__, False
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

    def _send(self, content: bytes, path: str) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := self._key():
            if not _is_token(key):
                raise RunError(f"{self.who}: the environment variable {self.key_env} holds {UNSENDABLE}; set it again")
            headers["Authorization"] = f"Bearer {key}"
        with self._lock:
            self.requests += 1
        request = urllib.request.Request(self.url.rstrip("/") + path if path else self.url, content, headers)
        with OPENER.open(request, timeout=self.timeout) as reply:
            body: bytes = reply.read(LARGEST_REPLY + 1)
        if len(body) > LARGEST_REPLY:
            raise RunError(f"{self.who} {self.url}: the reply is larger than {LARGEST_REPLY >> 20} MB: {body[:80]!r}")
        return body

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


def _start(error: urllib.error.HTTPError) -> bytes:
    """Return the first bytes of an error's body, as far as it can be read."""
    try:
        return error.read(200)
    except (OSError, http.client.HTTPException):
        return b""
