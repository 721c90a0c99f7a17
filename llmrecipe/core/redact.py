"""Redaction: the values of secrets are replaced in everything that reaches a file or the screen.

A secret is the value of an environment variable that a recipe names (`key: ${oc.env:NAME}`, or any key that ends in `_env`), or
one of the tokens that libraries read by themselves. Recipes contain names of variables and no values, so they are stored as
written; no text is ever treated as a secret because of what it looks like.
"""

from __future__ import annotations

import json
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "<redacted>"
VARIABLE = re.compile(r"\$\{\s*oc\.env:\s*([A-Za-z_]\w*)\s*\}")
"""How a recipe names an environment variable: `${oc.env:NAME}`."""
SECRET = "key"
"""The option whose value is a secret: it takes `${oc.env:NAME}` and nothing else."""
LEAST = 4
"""Shortest value that is treated as a secret: a shorter one occurs in too many words."""
_named = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"}


def name_variable(name: str | None) -> None:
    """Remember an environment variable whose value is a secret."""
    if name:
        _named.add(name)


def variable_of(text: str | None) -> str | None:
    """Return the variable a text names, `${oc.env:NAME}` and nothing around it; None for any other text."""
    found = VARIABLE.fullmatch(text.strip()) if text else None
    return found[1] if found else None


def variables_in(value: object, key: str = "") -> Iterator[str]:
    """Yield every environment variable a recipe names."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from variables_in(inner, str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from variables_in(inner, key)
    elif isinstance(value, str):
        found = value if key.endswith("_env") else variable_of(value) if key == SECRET else None
        if found:
            yield found


def name_variables(value: object) -> None:
    """Remember every environment variable a recipe names."""
    _named.update(variables_in(value))


def secrets() -> list[str]:
    """Return the values of the named variables in every form in which a message may hold them, longest first."""
    values = {form for name in _named for form in _forms(os.environ.get(name, ""))}
    return sorted((value for value in values if len(value) >= LEAST), key=len, reverse=True)


def _forms(value: str) -> Iterator[str]:
    """Yield a value as it is, without the white space around it, and as Python, JSON and addresses escape it."""
    for plain in (value, value.strip()):
        content = plain.encode("utf-8", "surrogateescape")
        yield from (
            plain,
            repr(plain)[1:-1],
            repr(content)[2:-1],
            json.dumps(plain)[1:-1],
            urllib.parse.quote(content, safe=""),
        )
        # A header is Latin-1.
        yield repr(plain.encode("latin-1", "replace"))[2:-1]


def redact_text(text: str) -> str:
    """Return the text without the values of named variables."""
    for value in secrets():
        text = text.replace(value, HIDDEN)
    return text


def redact(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON mapping without the values of named variables."""
    return {key: _redact(value) for key, value in mapping.items()}


def _redact(value: object) -> object:
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, list | tuple):
        return [_redact(v) for v in value]
    return redact_text(value) if isinstance(value, str) else value
