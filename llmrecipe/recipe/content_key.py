"""The content key of a run: a hash of its recipe, the results it depends on, the files it reads and the code of its plugins.

The version of the product is not part of it: what was finished under another version is reused, and each run records its
version in `environment.json`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from llmrecipe.core.paths import ASSETS
from llmrecipe.recipe.code_key import code_of
from llmrecipe.recipe.provenance import leaves
from llmrecipe.recipe.renames import first_words

REFERENCE = re.compile(r"\$\{\s*stage:\s*([A-Za-z_][\w-]*)\s*\}")
"""How a recipe names the result of a stage: `${stage:x}`."""
NO_RESULT = ("run", "log", "save")
"""Recipe keys that name folders and displays and do not affect what is learned."""
SMALL = 1 << 26
"""Bytes up to which a file other than data is identified by its content; larger ones by name, size and time."""


PATHS = ("path", "validation", "test")
"""Keys whose text is a file or folder even where it does not look like one."""


def content_key(mapping: Mapping[str, Any], inputs: Mapping[str, str], named: Collection[str] = PATHS) -> str:
    """Return the 8-hex-digit hash of a stage: its recipe, the results it depends on, its files and its plugins' code.

    Args:
        mapping: composed mapping with `${stage:x}` in place of the results of other stages.
        inputs: stage -> key.
        named: keys whose text is a path whatever it looks like.
    """
    content = {k: v for k, v in mapping.items() if k not in NO_RESULT}
    first = first_words(content)
    known = each_text(first, lambda text: REFERENCE.sub(lambda m: f"${{{inputs[m[1]]}}}", text))
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    for path, exact in local_files(content, named):
        digest.update(b"\0" + (_content(path) if exact or path.stat().st_size <= SMALL else _stamp(path)).encode())
    for name, code in sorted(code_of(first).items()):
        digest.update(f"\0code {name} {code}".encode())
    return digest.hexdigest()[:8]


def local_files(mapping: Mapping[str, Any], paths: Collection[str] = PATHS) -> list[tuple[Path, bool]]:
    """Return the local files that a recipe names, folders expanded; True marks data, always identified by its content."""
    named: list[tuple[str, bool]] = []
    for key, value in leaves(mapping):
        if key[:2] in (("data", "path"), ("model", "adapters")):
            named += [(str(name), key[0] == "data") for name in key[2:3]]
        for text in _strings(value):
            if "/" in text or Path(text).suffix or text.startswith("builtin:") or key[-1] in paths:
                named.append((text, key[0] == "data"))
    found: dict[Path, bool] = {}
    for text, exact in named:
        path = ASSETS / "data" / text.removeprefix("builtin:") if text.startswith("builtin:") else Path(text)
        try:
            path = path.expanduser()
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
        except (OSError, ValueError, RuntimeError):
            continue
        found |= {file: exact or found.get(file, False) for file in files}
    return sorted(found.items())


def _strings(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, str) and len(v) < 1024 and "${" not in v]


@functools.lru_cache(maxsize=4096)
def _content_at(path: Path, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content(path: Path) -> str:
    facts = path.stat()
    return _content_at(path, facts.st_size, facts.st_mtime_ns)


def _stamp(path: Path) -> str:
    facts = path.stat()
    return f"{path.name} {facts.st_size} {facts.st_mtime_ns}"


def each_text(mapping: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Return a mapping with a function applied to every string in it, at any depth."""
    return {key: _each_text(value, change) for key, value in mapping.items()}


def _each_text(value: object, change: Callable[[str], str]) -> object:
    if isinstance(value, Mapping):
        return each_text(value, change)
    if isinstance(value, list):
        return [_each_text(v, change) for v in value]
    return change(value) if isinstance(value, str) else value
