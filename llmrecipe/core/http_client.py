"""Asking a server over HTTP: JSON in, JSON text out, patient with a busy server and silent about secrets.

Nothing of a request or a reply enters a message without its secrets taken out: the bearer token, secret values of the
environment, user and password of an address.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llmrecipe.core.errors import RecipeError, RunError
from llmrecipe.core.redact import HIDDEN, name_variable, redact_text, variable_of

BUSY = (408, 425, 429, 500, 502, 503, 504)
"""Answers of a server that may go better a moment later."""
LONGEST_WAIT = 120.0
"""Seconds a server may make us wait before the next attempt, whatever it asks for."""


class _StayHere(urllib.request.HTTPRedirectHandler):
    """No redirects: the token is for the address that was given, and for no other."""

    def redirect_request(self, *_: Any) -> None:
        """Leave the reply as the error it is."""
        return


OPENER = urllib.request.build_opener(_StayHere)


class Refused(RunError):
    """The server will not answer this request, however often it is sent.

    Attributes:
        code: its HTTP status.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Unreadable(RunError):
    """The server answered each attempt, and never with what was asked for."""


def check_address(url: str, key: str | None, key_env: str | None, where: str) -> None:
    """Refuse what cannot be asked, before anything is loaded.

    Args:
        key: `${oc.env:NAME}`.
        key_env: NAME.
        where: key path for messages; no secret is ever repeated there.

    Raises:
        RecipeError: the address is none or holds a secret, the key is written out, or its variable is not set.
    """
    named = f"name the environment variable that holds it: {where}.key=\\${{oc.env:NAME}} or {where}.key_env=NAME"
    if key is not None and variable_of(key) is None:
        raise RecipeError(f"{where}.key: a key is not written into a recipe; {named}")
    if key is not None and key_env is not None:
        raise RecipeError(f"{where}.key_env: the key is named twice, by key and by key_env; keep one")
    if "@" in urllib.parse.urlsplit(url).netloc:
        raise RecipeError(f"{where}.url: user and password are not written into an address; {named}")
    if not url.startswith(("http://", "https://")):
        raise RecipeError(f"{where}.url: must be an address such as http://localhost:8000/v1; got {url!r}")
    variable = variable_of(key) or key_env
    name_variable(variable)
    if variable is not None and not os.environ.get(variable):
        raise RecipeError(f"{where}.{'key' if key else 'key_env'}: the environment variable {variable} is not set")


@dataclass
class Client:
    """One server. `post` may be called from several threads.

    A busy or broken server is asked again, the pause doubling with each attempt and spread by a random factor between one half
    and one and a half; `Retry-After`, in seconds or as a date, is obeyed instead where it is given.
    """

    url: str
    who: str
    """What the server is called in messages."""
    what: str
    """What it is asked for."""
    key_env: str | None = None
    """Environment variable with a bearer token."""
    timeout: float = 30.0
    retries: int = 4
    """Further attempts after a failure."""
    wait: float = 0.5
    """Seconds before the second attempt."""
    per_minute: int | None = None
    """Most requests in a minute, retries included."""
    accept: Callable[[bytes], str | None] | None = None
    """What is wrong with a reply, or None; a wrong one counts as a failure that may go better."""
    requests: int = 0
    """Requests sent so far, retries included."""
    _next: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _random: random.Random = field(default_factory=random.Random)

    def post(self, body: Any, path: str = "") -> bytes:
        """The reply to one JSON body.

        Raises:
            Refused: the server answered with a status that asking again does not mend.
            Unreadable: the last reply was one that `accept` does not take.
            RunError: it kept failing.
        """
        content = json.dumps(body, default=str).encode()
        trouble, answered = "", False
        for attempt in range(self.retries + 1):
            pause = self.wait * 2**attempt * self._random.uniform(0.5, 1.5)
            self._take_turn()
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
        """The text without this client's key and other secrets."""
        key = self._key()
        return redact_text(text.replace(key, HIDDEN) if key else text)

    def _key(self) -> str:
        return os.environ.get(self.key_env, "") if self.key_env is not None else ""

    def _send(self, content: bytes, path: str) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._key():
            headers["Authorization"] = f"Bearer {self._key()}"
        with self._lock:
            self.requests += 1
        request = urllib.request.Request(self.url.rstrip("/") + path if path else self.url, content, headers)
        with OPENER.open(request, timeout=self.timeout) as reply:
            return reply.read()

    def _take_turn(self) -> None:
        """Wait until the rate allows one more request."""
        if self.per_minute is None:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + 60.0 / self.per_minute
        time.sleep(turn - now)


def retry_after(value: str, otherwise: float) -> float:
    """Seconds that a `Retry-After` header asks for (a number or an HTTP date), at most `LONGEST_WAIT`."""
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
    """The first bytes of an error's body, as far as it can be read."""
    try:
        return error.read(200)
    except (OSError, http.client.HTTPException):
        return b""
