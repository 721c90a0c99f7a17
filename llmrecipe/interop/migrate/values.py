"""Values of other tools' files, in the types of a recipe.

Those tools read YAML 1.1, where `yes` and `on` are true; a number that YAML leaves as text (`2e-5`) they convert. Each reader
raises a ValueError whose text completes "... is not".
"""

from __future__ import annotations

import math
from collections.abc import Iterable

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0", "none", "")


def flag(value: object) -> bool:
    """Return a true or false."""
    word = str(value).lower()
    if word in TRUE or word in FALSE:
        return word in TRUE
    raise ValueError("true or false")


def compile_choice(value: object) -> str:
    """Return what of a model is compiled, from a true or false."""
    return "blocks" if flag(value) else "off"


def finite_number(value: object) -> float:
    """Return a finite number."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        read = float(value)
        if not math.isfinite(read):
            raise ValueError
        return read
    except (ValueError, OverflowError):
        raise ValueError("a finite number") from None


def whole_number(value: object) -> int:
    """Return a whole number."""
    read = finite_number(value)
    if read != int(read):
        raise ValueError("a whole number")
    return int(read)


def text(value: object) -> str:
    """Return a text."""
    if isinstance(value, dict | list):
        raise ValueError("one word")
    return str(value)


def words(value: object) -> list[str]:
    """Return a list of words, which may be written as one text with commas."""
    if isinstance(value, dict):
        raise ValueError("a list of words")
    parts: Iterable[object] = value if isinstance(value, list) else str(value).split(",")
    return [text(part).strip() for part in parts if str(part).strip()]


def plain_mapping(value: object) -> dict[str, str]:
    """Return a mapping of plain values."""
    if not isinstance(value, dict) or any(isinstance(inner, dict | list) for inner in value.values()):
        raise ValueError("a mapping of names to values")
    return {str(key): str(inner) for key, inner in value.items()}
