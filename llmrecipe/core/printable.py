"""Text of data as it may be shown on a terminal: control characters as escapes, long text shortened."""

from __future__ import annotations

import re

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and line feed, marks that reorder text, separators of lines, and halves of surrogate pairs."""
LONGEST_LINE = 2000
"""Characters of a line of a message that are shown."""
LONGEST_MESSAGE = 20_000
"""Characters of a message that are shown."""


def printable(text: str) -> str:
    r"""Return text with control characters written as escapes; tabs and line feeds stay.

    A terminal obeys such characters: they could hide, overwrite or reorder what is around them.

    Examples:
        >>> print(printable("red: \x1b[31m, back: \r, bell: \x07, reversed: \u202e"))
        red: \x1b[31m, back: \r, bell: \x07, reversed: \u202e
    """
    return UNPRINTABLE.sub(lambda found: _escape(found[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def shortened(text: str, longest: int) -> str:
    """Return text of at most `longest` characters, with the number of characters left out in its middle.

    Examples:
        >>> shortened("a" * 30 + "b" * 30, 44)
        'aa ... (56 characters left out) ... bb'
    """
    if len(text) <= longest:
        return text
    half = max((longest - 40) // 2, 1)
    return f"{text[:half]} ... ({len(text) - 2 * half:,} characters left out) ... {text[len(text) - half :]}"


def message_text(message: str) -> str:
    """Return an error, warning or note as it may be shown: printable, with long lines and long messages shortened."""
    lines = [shortened(line, LONGEST_LINE) for line in printable(message).split("\n")]
    return shortened("\n".join(lines), LONGEST_MESSAGE)
