"""Finds places of this machine in what is about to leave it.

Configurations, cards and plain text name files; vocabularies, merges and templates hold text of a language, in which
`/home/x` is a word like any other. The former are searched for whatever looks like a path of somebody's machine, a template
for places of this one, and a vocabulary for nothing.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

from llmrecipe.core.foreign import parse_json

ROOTS = (
    "home|root|Users|Volumes|private|work|workspace|tmp|mnt|media|data|opt|var|srv|scratch|gpfs|lustre|nfs|storage|projects?"
)
ABSOLUTE = re.compile(
    rf"(?:(?<![\w./:~-])|(?<=file://))/(?:{ROOTS})/[\w./-]+|(?<!\w)[A-Za-z]:(?:\\\\[\w.\\-]+|[\\/](?:Users|home)[\\/][\w.\\/-]+)"
)
"""Paths as they look on a machine, and not at the end of a web address."""
SEARCHED = frozenset({".json", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".txt", ".md", ".py", ".jinja", ".xml", ".log", ".sh"})
"""Endings of the files that are searched; others hold tensors, tables or pictures."""
VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"})
TEMPLATE = ".jinja"
WORDS = ("added_tokens_decoder", "chat_template")
"""Keys of a configuration whose values are words of a language."""
LARGEST = 1 << 24
"""Bytes of a JSON file that is parsed; a larger one is searched as text, a part at a time."""
CHUNK, OVERLAP = 1 << 20, 1 << 12
"""Characters searched at a time, and those searched again so that no path is cut in two."""


def machine_path(content: Path | bytes, name: str, folder: Path) -> str | None:
    """Return a place of this machine that a file names, or None.

    Args:
        content: the file, or what is in it.
        name: of the file in the repository.
        folder: that is pushed; it, its parent, the working folder and the home folder are places of this machine.
    """
    own, kind = _own_places(folder), Path(name).suffix
    if kind not in SEARCHED or Path(name).name in VOCABULARIES:
        return None
    patterns = (own,) if kind == TEMPLATE else (own, ABSOLUTE)
    texts = None
    if kind == ".json" and (isinstance(content, bytes) or content.stat().st_size <= LARGEST):
        with contextlib.suppress(ValueError):
            texts = _texts(parse_json(content if isinstance(content, bytes) else content.read_bytes()))
    for text in _parts(content) if texts is None else texts:
        for pattern in patterns:
            if (match := pattern.search(text)) is not None:
                return match[0]
    return None


def _own_places(folder: Path) -> re.Pattern[str]:
    """Return a pattern of the folders of this machine that a file of a folder may name, and of what is in them."""
    known = {folder.absolute(), folder.resolve(), folder.absolute().parent, Path.cwd(), Path.home()}
    names = sorted((str(place) for place in known if len(place.parts) > 1), key=len, reverse=True)
    return re.compile(rf"(?:{'|'.join(map(re.escape, names))})[\\/][\w.\\/-]*")


def _parts(content: Path | bytes) -> Iterator[str]:
    """Yield the text of a file in parts that overlap."""
    source = io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb")  # noqa: SIM115 (closed below)
    with io.TextIOWrapper(source, encoding="utf-8", errors="replace") as file:
        before = ""
        while part := file.read(CHUNK):
            yield before + part
            before = part[-OVERLAP:]


def _texts(value: object) -> Iterator[str]:
    """Yield the texts of a JSON value, keys too, without words of a language."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in WORDS:
                yield key
                yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value
