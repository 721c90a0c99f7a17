"""Which wrappers may share a stack: the table behind `list --pairs`, from the declared facts of each kind."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations_with_replacement

from llmrecipe.core import registry
from llmrecipe.recipe.validate import check_stack


@dataclass(frozen=True)
class Pair:
    """Two kinds in one stack."""

    first: str
    second: str
    reason: str | None
    """Why the pair is refused, in one line; None where it trains."""


def pairs() -> list[Pair]:
    """Return every unordered pair of registered wrappers, a kind with itself included (as two instances)."""
    found = []
    for first, second in combinations_with_replacement(registry.names("stack"), 2):
        stack = {"a": {"kind": first}, "b": {"kind": second}}
        mistakes = [m.text for m in check_stack(stack) if "needs" not in m.text]
        reason = (
            mistakes[0].replace("a and b cannot share a stack: ", "").replace("b and a cannot share a stack: ", "")
            if mistakes
            else None
        )
        found.append(Pair(first, second, reason))
    return found
