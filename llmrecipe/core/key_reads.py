"""Recording of which options of a recipe's components are read: a key that is set and read by nothing does nothing."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmrecipe.core.errors import ProofError

COPIES = ("dataclasses", "pydantic")
"""Modules whose reads are copies, not uses."""


class KeyReads:
    """Watches components until `stop`.

    Args:
        given: key paths that the recipe sets, such as ("stack", "lora", "r").
    """

    def __init__(self, given: Iterable[tuple[Any, ...]] = ()):
        self.given = {tuple(map(str, key)) for key in given}
        self.watched: dict[tuple[str, ...], tuple[Any, type]] = {}
        self.read: set[tuple[str, ...]] = set()

    def watch(self, component: object, *where: str) -> None:
        """Record every read of an option of a component at this key path."""
        cls = type(component)
        options = fields_of(cls)
        read = self.read

        def look_up(self: object, name: str) -> object:
            if name in options and sys._getframe(1).f_globals.get("__name__", "").split(".")[0] not in COPIES:
                read.add((*where, name))
            return object.__getattribute__(self, name)

        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        object.__setattr__(component, "__class__", type(cls.__name__, (cls,), {**names, "__getattribute__": look_up}))
        self.watched[where] = (component, cls)

    def stop(self) -> None:
        """Give every component its own class back."""
        for component, cls in self.watched.values():
            object.__setattr__(component, "__class__", cls)

    def options(self) -> list[tuple[str, ...]]:
        """Return the options of watched components that the recipe sets."""
        return sorted(
            (*where, name)
            for where, (_, cls) in self.watched.items()
            for name in fields_of(cls)
            if any(key[: len(where) + 1] == (*where, name) for key in self.given)
        )

    def count(self) -> dict[str, int]:
        """Return how many options the recipe sets, and how many of them have been read."""
        every = self.options()
        return {"set": len(every), "read": sum(key in self.read for key in every)}

    def unread(self) -> list[str]:
        """Return the options that were not read, and that no code of their component or its package reads later.

        A value that is the default says nothing: the recipe that a run keeps holds every default.
        """
        left = [key for key in self.options() if key not in self.read and not self._is_default(key)]
        return [".".join(key) for key in left if not mentioned(key[-1], self.watched[key[:-1]][1])]

    def _is_default(self, key: tuple[str, ...]) -> bool:
        component, cls = self.watched[key[:-1]]
        field = getattr(cls, "__pydantic_fields__", {}).get(key[-1])
        return field is not None and vars(component)[key[-1]] == field.get_default(call_default_factory=True)


def refuse_unread(keys: Iterable[str]) -> None:
    """Refuse keys that nothing reads.

    Raises:
        ProofError: there are any; it names them.
    """
    if found := sorted(keys):
        them = "it" if len(found) == 1 else "them"
        raise ProofError(
            f"{', '.join(found)}: the recipe sets {them} and nothing reads {them}, so the run would silently ignore {them}; "
            f"leave the key out, or correct the component that declares it"
        )


def fields_of(cls: type) -> frozenset[str]:
    """Return the names of a component's options."""
    return frozenset(field.name for field in dataclasses.fields(cls))


def mentioned(name: str, cls: type) -> bool:
    """Return whether the source of a class, of what it inherits or, of a plugin, of its package reads an attribute.

    Every option of a component of this package is read somewhere; a rule may do without some of the optimizer's.
    """
    if cls.__module__.startswith("llmrecipe."):
        return True
    pattern = re.compile(rf"\.{name}\b(?!\s*=[^=])|[\"']{name}[\"']")
    return any(pattern.search(path.read_text(encoding="utf-8", errors="replace")) for path in _sources(cls))


def _sources(cls: type) -> set[Path]:
    found: set[Path] = set()
    for base in cls.__mro__:
        file = getattr(sys.modules.get(base.__module__), "__file__", None)
        if file is None or base.__module__ in ("builtins", "abc"):
            continue
        package = sys.modules.get(base.__module__.split(".")[0])
        if package is not None and package.__name__ != "llmrecipe" and getattr(package, "__path__", None):
            found |= set(Path(next(iter(package.__path__))).rglob("*.py"))
        found.add(Path(file))
    return found
