"""The errors a user can meet, and the exit code each one ends with.

LlmRecipeError          1   a bug of llmrecipe: the traceback is saved
└── UserError           2   the user's input: one message that says what to change, no traceback
    ├── RecipeError     2   a recipe: key path, what was given, what is allowed, nearest spelling
    ├── DataError       2   data: file and row, what was found, the shortest fix
    ├── ModelError      2   weights, tokenizer or anatomy
    └── RunError        2   a run directory, a checkpoint or the disk
        └── ProofError  3   a run or `verify` failed its own proof
Interrupted           130   Ctrl-C or SIGTERM, after a checkpoint was written
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class LlmRecipeError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1
    process: str = ""
    """Which process of several met it, where the others did not."""


class UserError(LlmRecipeError):
    """Something the user can fix; shown as one message, exit code 2."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe that cannot be run."""


class DataError(UserError):
    """Data that cannot be trained on."""


class ModelError(UserError):
    """A model, tokenizer or target that does not fit."""


class RunError(UserError):
    """A run directory or checkpoint that cannot be used, or a disk that cannot hold it."""


class ProofError(RunError):
    """What a run or `llmrecipe verify` measured of itself is not what it must be: nothing that follows can be trusted."""

    exit_code = 3


class Interrupted(LlmRecipeError):
    """The run was stopped from outside after it had written a checkpoint."""

    exit_code = 130


def did_you_mean(word: str, known: Iterable[str], meanings: Mapping[str, str] | None = None) -> str:
    """Return `; did you mean 'x'?` for the nearest other spelling known, or an empty string when nothing is near.

    One typing error (a letter added, missing, wrong, or two swapped) counts as near even in words too short for a similarity
    ratio; so do half a word and a dash instead of an underscore. A choice whose meaning begins with the word is preferred to a
    longer similar name: `rank` is nearer to `r` ("Rank of A and B") than to `rank_pattern`; then comes one that contains it as
    a word or begins with it. One or two letters are more likely a whole word than a typing error: `lr` is nearer to `lr_ratio`
    than to `r`.

    Args:
        meanings: choice -> what it means, in a sentence.

    Examples:
        >>> did_you_mean("lorra", ["lora", "dora", "sft"])
        "; did you mean 'lora'?"
        >>> did_you_mean("xyz", ["lora"])
        ''
    """
    choices = [choice for choice in known if choice != word]
    plain = word.lower().replace("-", "_")
    words = sorted((c for c in choices if plain in c.split("_")), key=len)
    near = [c for c in choices if c == plain] or (words if len(plain) < 3 else [])
    near = near or [c for c in choices if _one_slip(plain, c)]
    near = near or sorted((c for c in choices if _opens_with((meanings or {}).get(c, ""), plain)), key=len)
    near = near or words or sorted((c for c in choices if len(plain) > 2 and c.startswith(plain)), key=len)
    near = near or difflib.get_close_matches(plain, choices, n=1, cutoff=0.6)
    near = near or [c for c in choices if len(plain) > 1 and c.startswith(plain)]
    return f"; did you mean '{near[0]}'?" if near else ""


def _opens_with(sentence: str, word: str) -> bool:
    start = word.replace("_", " ")
    return sentence.lower().startswith(start) and not sentence[len(start) : len(start) + 1].isalnum()


def _one_slip(word: str, other: str) -> bool:
    if abs(len(word) - len(other)) > 1 or min(len(word), len(other)) < 1 or len(word) + len(other) < 3:
        return False
    start = next((i for i, (a, b) in enumerate(zip(word, other, strict=False)) if a != b), min(len(word), len(other)))
    rest, target = word[start:], other[start:]
    swapped = len(rest) > 1 and rest[1] + rest[0] + rest[2:] == target
    return swapped or rest[1:] == target or rest == target[1:] or rest[1:] == target[1:]
