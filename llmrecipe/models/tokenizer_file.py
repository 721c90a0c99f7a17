"""Reading a tokenizer, with bounds on its files that are checked before its library reads them.

Bounded are `tokenizer.json`, and the vocabularies that the library converts: Mistral's `tekken.json` and tiktoken's.

What the library compiles, and how far it makes a text grow, is decided by a file that somebody else wrote, and nothing stops
the library once it has begun: it holds the interpreter's lock while it loads a file and while it decodes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import ModelError
from llmrecipe.core.foreign import DuplicateKey, parse_json
from llmrecipe.data.tokenize.call_tokenizer import call_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE, SETTINGS, TEKKEN = "tokenizer.json", "tokenizer_config.json", "tekken.json"
TIKTOKEN = ("tiktoken.model", "tokenizer.model")
"""Either may be a list of tokens and ranks; the second is more often a SentencePiece model."""
RANKED = re.compile(rb"([A-Za-z0-9+/]+=*) +\d+\s*")
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
PATTERNS = 20_000
"""Characters of all regular expressions together, which compile in about a second; known tokenizers have hundreds."""
GROWTH = 1_000
"""Times as long as a text that what it becomes may be."""
LONGEST = 64
"""Characters of an added token that a regular expression of the normalizer is run on while the file is loaded."""
SPARE = 1_000_000
"""Ids that no token has: an embedding has a row for each."""
SPLITS = 10**9
"""Bytes that are copied while every token is cut in two at every place, which takes seconds; known vocabularies need 10^7."""
REMEDY = "take another tokenizer.path"


def read_tokenizer(
    place: str, local: bool, trust_remote_code: bool = False, **hub: str | bool | None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub name, after one text has been encoded: some damage shows only there.

    Args:
        hub: `revision` and `local_files_only` of a hub name.

    Raises:
        ModelError: it is out of bounds (see `check_tokenizer_folder`).
        BaseException: what its library raises for anything else.
    """
    from transformers import AutoTokenizer

    folder = Path(place) if local else _cached(place, hub)
    if folder is not None:
        check_tokenizer_folder(folder)
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **hub)
    given = getattr(found, "chat_template", None)
    texts = list(given.values()) if isinstance(given, dict) else [given]
    if wrong := next((text for text in texts if not isinstance(text, str | None)), None):
        raise ModelError(f"tokenizer.path: {place}: its chat template is no text: {wrong!r:.60}; {REMEDY}")
    call_tokenizer(found, "a b")
    return found


def _cached(name: str, hub: Mapping[str, Any]) -> Path | None:
    """Return the folder of the hub cache that holds the files of a tokenizer, after they have been downloaded."""
    from transformers.utils import cached_file

    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    files = (SETTINGS, TEKKEN, FILE)
    found = [cached_file(name, file, **hub, **quietly) for file in files]
    if found[-1] is None:
        found += [cached_file(name, file, **hub, **quietly) for file in TIKTOKEN]
    return next((Path(path).parent for path in found if path is not None), None)


def check_tokenizer_folder(folder: Path) -> None:
    """Refuse a tokenizer that takes unbounded time or memory to load or to use; other damage is left to the library.

    Raises:
        ModelError: naming the file, what it holds and the bound.
    """
    settings = _read(folder / SETTINGS)
    # A folder may hold several, by version of the library that reads them.
    versions = [folder / str(name) for name in _list(settings, "fast_tokenizer_files")]
    for path in dict.fromkeys([folder / FILE, *versions]):
        if fault := _fault(_read(path), settings):
            raise ModelError(f"tokenizer.path: {path}: {fault}; {REMEDY}")
    if fault := _tekken_fault(_read(folder / TEKKEN)):
        raise ModelError(f"tokenizer.path: {folder / TEKKEN}: {fault}; {REMEDY}")
    for path in (folder / name for name in TIKTOKEN):
        if fault := _long_tokens(_ranked(path)):
            raise ModelError(f"tokenizer.path: {path}: {fault}; {REMEDY}")
    if fault := _wide_ids(_listed(settings)):
        raise ModelError(f"tokenizer.path: {folder / SETTINGS}: {fault}; {REMEDY}")


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; nothing of one that the library will refuse with a message of its own."""
    try:
        found = parse_json(path.read_bytes(), unique="words")
    except DuplicateKey as error:
        raise ModelError(f"tokenizer.path: {path}: {error}; {REMEDY}") from error
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _fault(content: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """Return what is out of bounds in a tokenizer, or None."""
    patterns = [pattern for name in PARTS for pattern in _patterns(content.get(name))]
    total = sum(map(len, patterns))
    if total > PATTERNS:
        longest = max(map(len, patterns))
        return f"its regular expressions have {total:,} characters, the longest {longest:,}; at most {PATTERNS:,} are compiled"
    if _patterns(content.get("decoder")):
        return "its decoder has a regular expression, which nothing can stop"
    for name in PARTS:
        times = math.prod(map(_growth, _parts(content.get(name))))
        if times > GROWTH:
            return f"its {name} can make a text {times:,.0f} times as long; at most {GROWTH:,} times is allowed"
    long = max((len(str(t.get("content"))) for t in _added(content, settings) if t.get("normalized")), default=0)
    if long > LONGEST and _patterns(content.get("normalizer")):
        return (
            f"the regular expressions of its normalizer run on an added token of {long:,} characters; at most {LONGEST} may be"
        )
    return _wide_ids(_ids(content))


def _tekken_fault(content: Mapping[str, Any]) -> str | None:
    """Return what is out of bounds in Mistral's vocabulary, or None."""
    config = content.get("config")
    config = config if isinstance(config, dict) else {}
    pattern, special = config.get("pattern"), config.get("default_num_special_tokens")
    if isinstance(pattern, str) and len(pattern) > PATTERNS:
        return f"its regular expression has {len(pattern):,} characters; at most {PATTERNS:,} are compiled"
    if isinstance(special, int | float) and special > SPARE:
        return f"it keeps {special:,} ids for special tokens; at most {SPARE:,} ids may be free"
    tokens = (token.get("token_bytes") for token in _list(content, "vocab") if isinstance(token, dict))
    return _long_tokens(len(token) for token in tokens if isinstance(token, str))


def _ranked(path: Path) -> list[int]:
    """Return the characters of each token of tiktoken's vocabulary; nothing of another file."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    found = [RANKED.fullmatch(line) for line in lines if line]
    return [len(match[1]) for match in found if match] if all(found) else []


def _long_tokens(characters: Iterable[int]) -> str | None:
    """Return what is wrong with tokens in base64 that take too long to be cut, or None.

    Args:
        characters: of each token; four stand for three bytes.
    """
    sizes = [number * 3 // 4 for number in characters]
    if sum(size * size for size in sizes) > SPLITS:
        return f"the longest of its {len(sizes):,} tokens has {max(sizes):,} bytes; forming its merges would take minutes"
    return None


def _added(content: Mapping[str, Any], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the added tokens of a tokenizer and of its settings."""
    return [token for token in (*_list(content, "added_tokens"), *_listed(settings).values()) if isinstance(token, dict)]


def _parts(value: object) -> Iterator[dict[str, Any]]:
    """Yield every mapping inside a value."""
    todo = [value]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            yield part
            todo += part.values()
        elif isinstance(part, list):
            todo += part


def _patterns(value: object) -> list[str]:
    """Return the regular expressions inside a part of a tokenizer."""
    return [part["Regex"] for part in _parts(value) if isinstance(part.get("Regex"), str)]


def _growth(part: Mapping[str, Any]) -> float:
    """Return the times as long as a text that one part of a tokenizer can make it, at least one.

    Of a template it is the number of tokens that it can put around a text.
    """
    kind, sought, special = part.get("type"), part.get("pattern"), part.get("special_tokens")
    if kind == "Replace":
        text = sought.get("String") if isinstance(sought, dict) else None
        return max(1.0, len(str(part.get("content"))) / max(1, len(text) if isinstance(text, str) else 1))
    if kind == "Prepend":
        return max(1.0, len(str(part.get("prepend"))))
    if kind == "TemplateProcessing":
        tokens = [len(_list(token, "ids")) for token in special.values()] if isinstance(special, dict) else []
        return max(1.0, len(_list(part, "single")), len(_list(part, "pair"))) * max(1, *tokens, 1)
    return 1.0


def _list(value: object, key: str) -> list[Any]:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, list) else []


def _listed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the added tokens of a tokenizer's settings by id."""
    found = settings.get("added_tokens_decoder")
    return found if isinstance(found, dict) else {}


def _ids(content: Mapping[str, Any]) -> list[Any]:
    """Return the ids of a tokenizer's vocabulary and added tokens; a vocabulary that is a list counts its own."""
    model = content.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    ids = list(words.values()) if isinstance(words, dict) else list(range(len(words))) if isinstance(words, list) else []
    return [*ids, *(token.get("id") for token in _list(content, "added_tokens") if isinstance(token, dict))]


def _wide_ids(ids: Iterable[object]) -> str | None:
    """Return what is wrong with ids that leave too many others free, or None."""
    numbers = {int(i) for i in ids if isinstance(i, int) or (isinstance(i, str) and i.isdecimal() and len(i) < 20)}
    if numbers and max(numbers) - len(numbers) > SPARE:
        return f"a token has the id {max(numbers):,} among {len(numbers):,} tokens; at most {SPARE:,} ids may be free"
    return None
