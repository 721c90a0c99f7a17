"""Secrets never reach a file or a screen: what looks like one is replaced before anything is written."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<redacted>"

NAMES = re.compile(
    r"(?:^|[._-])(?:api_?key|secret|passw(?:or)?d|credentials?|private_?key|(?:access|auth|api|hf|hub|bearer)_?token)$", re.I
)
"""Names of keys whose value is a secret; `tokens`, `pad_token` and `max_new_tokens` are not."""

ENVIRONMENT = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.I)
"""Names of environment variables whose value is a secret."""

SHAPES = re.compile(
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[opsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
"""Access tokens by their usual prefix, and user:password in an address."""

ASSIGNED = re.compile(r"(?P<name>[\w.-]+)(?P<sign>=|:\s*)(?P<value>[^\s,'\"}\]]+)")


def secrets() -> list[str]:
    """Values of this process's environment that are secrets, longest first."""
    values = {v for k, v in os.environ.items() if ENVIRONMENT.search(k) and len(v) >= 8}
    return sorted(values, key=len, reverse=True)


def redact_text(text: str) -> str:
    """The text without secret values of the environment, known token shapes and `api_key=...` assignments."""
    for value in secrets():
        text = text.replace(value, HIDDEN)
    text = SHAPES.sub(HIDDEN, text)
    return ASSIGNED.sub(lambda m: f"{m['name']}{m['sign']}{HIDDEN}" if NAMES.search(m["name"]) else m[0], text)


def redact(value: Any) -> Any:
    """A JSON value without secrets: values of secret keys, and secrets inside any text."""
    if isinstance(value, Mapping):
        return {k: HIDDEN if v and isinstance(v, str) and NAMES.search(str(k)) else redact(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact(v) for v in value]
    return redact_text(value) if isinstance(value, str) else value
