"""Errors of other people's code and of the system, as errors of this project.

Every call into a library that reads a user's file goes through `reading`, so that a damaged file ends in one message with its
place and a remedy, whatever class of error the library raises for it.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from llmrecipe.core.errors import LlmRecipeError, RunError, UserError
from llmrecipe.core.printable import shortened

DEPTH = 128
"""Deepest nesting of a JSON text."""
LARGEST = 2**63 - 1
"""Largest whole number that libraries hold."""
REASON = 300
"""Characters of another library's message that are passed on."""
NO_MEMORY = (
    "can't allocate memory", "out of memory", "cannot allocate memory", "unable to allocate", "array is too big",
    "status_alloc_failed",
)  # fmt: skip


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where it has none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if type(error).__module__.startswith("pydantic") and (listed := getattr(error, "errors", None)) is not None:
        first = listed(include_url=False)[0]
        return shortened(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", REASON)
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else ""
    if isinstance(error, KeyError):
        return f"{text} is missing" if text else "KeyError"
    return shortened(text, REASON) if text else type(error).__name__


def is_panic(error: BaseException) -> bool:
    """Return whether a library written in Rust has given up: its class is no `Exception`, and no module exports it."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def reading(what: str, remedy: str = "", error: type[UserError] = RunError) -> Iterator[None]:
    """Turn every error of foreign code into `WHAT: REASON; REMEDY`; errors of this project pass unchanged.

    Args:
        what: place and thing, such as `model.path: FOLDER/config.json`.
        remedy: what the user can do, without a leading semicolon.
        error: class of the error.

    Raises:
        UserError: of the class given.
    """
    try:
        yield
    except (LlmRecipeError, MemoryError):
        raise
    except BaseException as foreign:  # libraries raise dozens of unrelated classes for a damaged file
        if not isinstance(foreign, Exception) and not is_panic(foreign):
            raise
        if type(foreign).__name__ == "OutOfMemoryError":  # torch: the accelerator is full, which is no fault of the file
            raise
        raise error(f"{what}: {reason_of(foreign)}{f'; {remedy}' if remedy else ''}") from foreign


class DuplicateKey(ValueError):
    """An object of a JSON text holds a key more than once, so that one of its values would be lost."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of a JSON text; the hook that makes a parser refuse a repeated key.

    Raises:
        DuplicateKey: naming the key.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise DuplicateKey(f"the key {twice!r:.80} is there {keys.count(twice)} times in one object")
    return found


def once_or_words(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of a JSON text as `once` does, where a table of words and numbers may repeat a word."""
    found = dict(pairs)
    return found if len(found) == len(pairs) or all(isinstance(value, int) for value in found.values()) else once(pairs)


def parse_json(text: str | bytes, unique: bool | Literal["words"] = False) -> Any:
    """Parse JSON of bounded depth.

    Args:
        unique: refuse an object that holds a key more than once, as the last value would win in silence; `words` lets a table
            of words and numbers repeat a word.

    Raises:
        ValueError: it is not JSON (a `json.JSONDecodeError`), is nested too deeply, holds a number of thousands of digits, or
            repeats a key (`DuplicateKey`).
    """
    try:
        value = json.loads(text, object_pairs_hook=once_or_words if unique == "words" else once if unique else None)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH} levels") from None
    except (json.JSONDecodeError, DuplicateKey):
        raise
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        if "digits" in str(error):
            raise ValueError("a number of more than 4300 digits") from None
        raise
    opened = text.count(b"[") + text.count(b"{") if isinstance(text, bytes) else text.count("[") + text.count("{")
    if opened > DEPTH and _deeper(value, DEPTH):
        raise ValueError(f"nested deeper than {DEPTH} levels")
    return value


def _deeper(value: object, levels: int) -> bool:
    """Return whether a value is nested deeper than a number of levels."""
    layer: list[Any] = [value]
    for _ in range(levels):
        inner = [child for one in layer for child in (one.values() if isinstance(one, dict) else one)]
        layer = [child for child in inner if isinstance(child, dict | list)]
        if not layer:
            return False
    return True


def stored_count(value: object, name: str) -> int:
    """Return a whole number of at least zero that a file holds.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise ValueError(f"{name} is {value!r:.60}, no whole number")
    return value


def stored_number(value: object, name: str) -> float:
    """Return a finite number that a file holds.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > LARGEST or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r:.60}, no finite number")
    return value


def read_json(path: Path, what: str = "", remedy: str = "", error: type[UserError] = RunError, kind: type = dict) -> Any:
    """Read a JSON file that holds a mapping (or a value of another kind).

    Args:
        what: key path for the message.

    Raises:
        UserError: of the class given: it cannot be read, is not JSON, or holds something else.
    """
    with reading(f"{what}{': ' if what else ''}{path}", remedy, error):
        content = path.read_bytes()
        try:
            value = parse_json(content)
        except ValueError as wrong:
            raise ValueError(f"not valid JSON: {wrong}") from wrong
        if not isinstance(value, kind):
            raise ValueError(f"must hold a JSON {'object' if kind is dict else kind.__name__}, not {type(value).__name__}")
    return value


def as_user_error(error: BaseException) -> UserError | None:
    """Return what a user can do about an error of the system that no boundary has named, or None for any other error."""
    if is_panic(error):
        return RunError(
            f"a library gave up on what it was given: {reason_of(error)}; a tokenizer.json or a file of tensors that somebody "
            "has changed is the usual reason: download or save it again"
        )
    text = str(error).lower()
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in text for sign in NO_MEMORY)):
        return RunError(
            f"the memory is not enough: {reason_of(error)}; lower batch.micro or data.max_length, set "
            "model.gradient_checkpointing=true, or use smaller numbers (`llmrecipe check` estimates the memory)"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return RunError(f"{error.filename}: {reason_of(error)}")
    if isinstance(error, ImportError) and not (root := _first_cause(error)).startswith("llmrecipe"):
        return RunError(
            f"a library cannot be imported here: {root}. It is missing, damaged, or made for another system or another version "
            "of Python or of a library it needs: `llmrecipe doctor` shows what is installed and what it was tested with"
        )
    return None


def _first_cause(error: ImportError) -> str:
    """Return what the innermost of chained import errors says: libraries that import lazily wrap the one that tells why."""
    cause = error.__cause__ or error.__context__
    while cause is not None:
        error = cause if isinstance(cause, ImportError) else error
        cause = cause.__cause__ or cause.__context__
    return f"{error.name}: {reason_of(error)}" if error.name else reason_of(error)
