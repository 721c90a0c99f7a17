"""Which wrappers may share a stack: one rule for recipes, tables of pairs and runs, from what each kind declares.

Recipes and tables read the declarations from the source, without importing a method; a run reads them from the classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Protocol

from llmrecipe.core.registry import Spec, name_of


class Built(Protocol):
    """What a stack rule reads of a built wrapper, in addition to what its class declares (see the interface `Wrapper`)."""

    @property
    def name(self) -> str:
        """Return its key in the stack."""

    @property
    def role(self) -> str:
        """Return the one role it serves; empty for the policy's own methods."""

    @classmethod
    def reads_gradients(cls) -> bool:
        """Return whether the method acts on gradients."""


@dataclass(frozen=True)
class Declared:
    """What one entry of a stack declares of its company."""

    name: str
    """Its key in the stack."""
    kind: str
    is_rule: bool = False
    """Whether it replaces how an update is made."""
    gradient_free: bool = False
    """Whether the update it makes needs no gradients, so that there are none."""
    needs_gradients: str = ""
    """What it does with gradients, where it cannot do without."""
    conflicts: Mapping[str, str] = field(default_factory=dict)
    """Kind -> why it cannot share a stack with this one."""
    conflicts_by_default: Mapping[str, str] = field(default_factory=dict)
    """Kind -> why it cannot with its default options."""
    modality: str = ""
    """What a model must read for it; empty where anything will do."""
    requires: Sequence[str] = ()
    """Kinds that must be in the stack too."""
    needs_base: str = ""
    """What it does with the base's weights, where that is nothing unless they train."""
    alone: str = ""
    """What it does that leaves no place for another method that trains."""
    freezes: bool = False
    """Whether it trains something of its own and freezes the base."""

    @classmethod
    def of_spec(cls, name: str, spec: Spec) -> Declared:
        """Return what the source of a kind declares."""
        return cls._of(name, spec.name, {key: spec.facts.get(key) for key in FACTS})

    @classmethod
    def of_wrapper(cls, wrapper: Built) -> Declared:
        """Return what the class of a built wrapper declares."""
        kind = type(wrapper)
        found = {key: getattr(kind, key, None) for key in FACTS}
        if not found["needs_gradients"] and wrapper.reads_gradients():
            found["needs_gradients"] = "works on gradients"
        return cls._of(wrapper.name, name_of(kind), found, wrapper.role)

    @classmethod
    def _of(cls, name: str, kind: str, facts: Mapping[str, Any], role: str = "") -> Declared:
        stage = str(getattr(facts["stage"], "name", facts["stage"] or DEFAULT_STAGE)).removeprefix("Stage.")
        return cls(
            name,
            kind,
            stage == "RULE",
            bool(facts["gradient_free"]),
            str(facts["needs_gradients"] or ""),
            _mapping(facts["conflicts"]),
            _mapping(facts["conflicts_by_default"]),
            str(facts["modality"] or ""),
            tuple(facts["requires"] or ()),
            str(facts["needs_base"] or ""),
            str(facts["alone"] or ""),
            stage in FREEZING and not role,
        )

    def refuses(self, other: Declared, by_default: bool = False) -> str | None:
        """Return why this one cannot share a stack with another one; None where nothing it declares forbids it.

        Args:
            by_default: the other one has its default options.
        """
        if other.kind in self.conflicts:
            return self.conflicts[other.kind]
        if by_default and other.kind in self.conflicts_by_default:
            return self.conflicts_by_default[other.kind]
        if self.modality and other.modality and self.modality != other.modality:
            return f"{self.kind} is for models that read {self.modality}, {other.kind} for models that read {other.modality}"
        if self.needs_gradients and other.gradient_free:
            return f"{self.kind} {self.needs_gradients}, and {other.kind} makes none"
        if self.needs_base and other.freezes:
            return f"{self.kind} {self.needs_base}, and {other.kind} freezes it; without {other.kind} all of it trains"
        if self.alone and other.freezes:
            return f"{self.kind} {self.alone}"
        return None


FACTS = (
    "stage", "gradient_free", "needs_gradients", "conflicts", "conflicts_by_default", "modality", "requires", "needs_base",
    "alone",
)  # fmt: skip
"""Class attributes that are read."""
DEFAULT_STAGE = "INJECT"
"""The stage of a method whose source names none."""
FREEZING = ("INJECT", "SELECT")
"""Stages whose methods freeze the base."""


def _mapping(value: object) -> Mapping[str, str]:
    """Return what a kind declares, or nothing where its source does not say it literally."""
    return value if isinstance(value, Mapping) else {}


@dataclass(frozen=True)
class Refusal:
    """One reason why a stack is impossible."""

    name: str
    """The entry that is named first."""
    text: str
    reason: str = ""
    """The bare reason, where it is between two entries."""


def refusals(stack: Sequence[Declared], by_default: bool = False) -> list[Refusal]:
    """Return everything the declarations forbid: conflicts, missing requirements, two update rules.

    Args:
        by_default: all entries have their default options.
    """
    return [*_conflicts(stack, by_default), *_missing(stack), *_rules(stack)]


def _conflicts(stack: Sequence[Declared], by_default: bool) -> Iterator[Refusal]:
    for first, second in combinations(stack, 2):
        for one, other in ((first, second), (second, first)):
            if reason := one.refuses(other, by_default):
                yield Refusal(one.name, f"{one.name} and {other.name} cannot share a stack: {reason}", reason)
                break


def _missing(stack: Sequence[Declared]) -> Iterator[Refusal]:
    kinds = {entry.kind for entry in stack}
    for entry in stack:
        for kind in entry.requires:
            if kind not in kinds:
                yield Refusal(entry.name, f"{entry.kind} needs {kind} in the stack too")


def _rules(stack: Sequence[Declared]) -> Iterator[Refusal]:
    rules = [entry.name for entry in stack if entry.is_rule]
    if len(rules) > 1:
        text = f"{' and '.join(rules)} both replace the update rule; keep one"
        yield Refusal(rules[1], text, "both replace the update rule; keep one")
