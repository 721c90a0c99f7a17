"""Which wrappers may share a stack, with default options: the table behind `list --pairs`, from what each kind declares."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations_with_replacement

from llmrecipe.core import registry
from llmrecipe.recipe.stack_rules import Declared, refusals


@dataclass(frozen=True)
class MethodPair:
    """Two kinds in one stack."""

    first: str
    second: str
    reason: str | None
    """Why the pair is refused with default options, in one line; None where it trains."""


def pairs() -> list[MethodPair]:
    """Return every unordered pair of registered wrappers, a kind with itself included (as two instances)."""
    found = []
    for first, second in combinations_with_replacement(registry.names("stack"), 2):
        stack = [Declared.of_spec(name, registry.spec("stack", kind)) for name, kind in (("a", first), ("b", second))]
        reason = next((refusal.reason for refusal in refusals(stack, by_default=True) if refusal.reason), None)
        found.append(MethodPair(first, second, reason))
    return found
