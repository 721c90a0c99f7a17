"""The account of one migration: what became of every key of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.recipe.yaml_file import YamlFile

Fate = Literal["carried", "same", "written out", "left", "unknown"]
FATES: dict[Fate, str] = {
    "carried": "carried over",
    "written out": "defaults of the other tool that differ here, written out",
    "same": "nothing to set here",
    "left": "not carried over",
    "unknown": "not known",
}
"""What can become of a key -> the heading of its list."""


@dataclass(frozen=True)
class Entry:
    """What became of one key: its value in the file, the keys of the recipe that say the same, and what to know or do."""

    key: str
    given: Any
    fate: Fate
    here: tuple[tuple[str, Any], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class To:
    """A key that has another name here.

    Attributes:
        path: key of the recipe.
        read: turns the given value into the recipe's.
        default: value that an absent key has in the other tool; None writes nothing.
        note: what is different although the name is all that changes.
        objectives: objectives that have this option; empty: it belongs to every recipe.
    """

    path: str
    read: Callable[[Any], Any] = lambda value: value
    default: Any = None
    note: str = ""
    objectives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Same:
    """A key that needs nothing here, whatever its value."""

    note: str


@dataclass(frozen=True)
class Only:
    """A key without a counterpart: nothing is lost where its value is one of `neutral`, which leaves the feature off."""

    remedy: str
    neutral: tuple[Any, ...] = (False, 0)


Rule = To | Same | Only


@dataclass
class Account:
    """A file, the recipe that is made of it, and the entries so far.

    Attributes:
        tool: name of the other tool.
        source: the parsed file.
        processes: devices that the file was used on, which its batch size is multiplied by.
    """

    tool: str
    source: YamlFile
    processes: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    """Key path of the recipe -> value."""
    choices: dict[str, Any] = field(default_factory=dict)
    """Group -> what is chosen of it: objective, stack, optim, schedule."""
    entries: list[Entry] = field(default_factory=list)
    claimed: set[str] = field(default_factory=set)
    looked: set[str] = field(default_factory=set)
    """Keys that a table has read, given or not."""

    @property
    def given(self) -> dict[str, Any]:
        """The whole mapping of the file."""
        return self.source.value

    def raw(self, key: str) -> Any:  # noqa: ANN401 (what a YAML file holds)
        """Return the value at a key such as `optimizer.lr` or `datasets[0].path`, None where it is not given."""
        self.looked.add(key)
        value: Any = self.given
        for part in key_steps(key):
            if isinstance(part, int):
                value = value[part] if isinstance(value, list) and part < len(value) else None
            else:
                value = value.get(part) if isinstance(value, dict) else None
        return value

    def read(self, key: str, reader: Callable[[Any], Any], default: Any = None) -> Any:  # noqa: ANN401 (as the reader returns)
        """Return a value in its type.

        Raises:
            RecipeError: it is not of that type.
        """
        value = self.raw(key)
        if value is None:
            return default
        try:
            return reader(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise RecipeError(f"{self.source.where(*key_steps(key))}: {key}: {value!r:.80} is not {error}") from error

    def carry(self, key: str, path: str, value: object, note: str = "") -> None:
        """Write a value at a key of the recipe, because of a key of the file."""
        self.settings[path] = value
        self._enter(Entry(key, self.raw(key), "carried", ((path, value),), note))

    def chosen(self, key: str, group: str, value: object, note: str = "") -> None:
        """Choose from a group of components, because of a key of the file."""
        self.choices[group] = value
        self._enter(Entry(key, self.raw(key), "carried", ((group, value),), note))

    def explain(self, key: str, note: str) -> None:
        """Enter a key that has been taken into account under another one."""
        self._enter(Entry(key, self.raw(key), "carried", (), note))

    def same(self, key: str, note: str) -> None:
        """Enter a key that needs nothing here."""
        self._enter(Entry(key, self.raw(key), "same", (), note))

    def leave(self, key: str, remedy: str) -> None:
        """Enter a key that has no counterpart, with what to do about it."""
        self._enter(Entry(key, self.raw(key), "left", (), remedy))

    def assume(self, key: str, path: str, value: object, note: str = "") -> None:
        """Write what an absent key of the file stands for in the other tool."""
        self.settings[path] = value
        self.entries.append(Entry(key, None, "written out", ((path, value),), note))

    def _enter(self, entry: Entry) -> None:
        if self.raw(entry.key) is None and entry.fate != "left":
            return
        self.claimed.add(entry.key)
        self.entries.append(entry)

    def drop_defaults(self, default: Callable[[str], Any]) -> None:
        """Take back what an absent key of the file stands for where it is the default of the recipe too."""
        for entry in [entry for entry in self.entries if entry.fate == "written out" and entry.here]:
            path, value = entry.here[0]
            known = default(path)
            if known is not None and known == value and isinstance(known, bool) == isinstance(value, bool):
                self.entries.remove(entry)
                if not any(path in dict(other.here) for other in self.entries):
                    self.settings.pop(path, None)

    def apply(self, rules: Mapping[str, Rule], objective: str) -> None:
        """Apply a table to every key that has not been entered yet, and name the keys it does not know."""
        for key, value in leaf_values(self.given):
            if any(key == done or key.startswith((f"{done}.", f"{done}[")) for done in self.claimed):
                continue
            name, rule = rule_of(rules, key)
            if value is None and key in self.looked:
                self.entries.append(Entry(key, value, "same", (), "not set"))
            elif rule is None:
                self.entries.append(Entry(key, value, "unknown", (), self._unknown(key, rules)))
            elif value is None or value in ([], {}):
                self.entries.append(Entry(key, value, "same", (), "not set"))
            else:
                self._apply(key, name, value, rule, objective)
        for name, rule in rules.items():
            if not isinstance(rule, To) or rule.default is None or self.raw(name) is not None:
                continue
            if not rule.objectives or objective in rule.objectives:
                self.assume(name, rule.path, rule.default)

    def _apply(self, key: str, name: str, value: object, rule: Rule, objective: str) -> None:
        if isinstance(rule, Same):
            self.same(key, rule.note)
        elif isinstance(rule, Only):
            if any(value is one or (value == one and type(value) is type(one)) for one in rule.neutral):
                self.same(key, "as here")
            else:
                self.leave(key, rule.remedy)
        elif name != bare_key(key):
            self.leave(key, f"{name} is one value ({rule.path} here), not a mapping")
        elif rule.objectives and objective not in rule.objectives:
            self.leave(key, f"{objective} has no such option here ({rule.path} belongs to {', '.join(rule.objectives)})")
        else:
            self.carry(key, rule.path, self.read(key, rule.read), rule.note)

    def _unknown(self, key: str, rules: Mapping[str, Rule]) -> str:
        near = did_you_mean(bare_key(key), {*rules, *map(bare_key, self.looked)} - {bare_key(key)})
        return f"no key of {self.tool} that is known here{near}; look up what it does, and set it by hand where it matters"


def value_at(mapping: Mapping[str, Any], path: str) -> Any:  # noqa: ANN401 (what a mapping holds)
    """Return the value at a dotted path, None where there is none."""
    value: Any = mapping
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def key_steps(key: str) -> tuple[str | int, ...]:
    """Split a key into names and list indices.

    Examples:
        >>> key_steps("datasets[0].path")
        ('datasets', 0, 'path')
    """
    parts: list[str | int] = []
    for name in key.split("."):
        word, *indices = name.split("[")
        parts += [word, *(int(index.rstrip("]")) for index in indices)]
    return tuple(parts)


def leaf_values(value: object, at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of a mapping that is none itself, with its key; mappings in lists are walked through as well."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaf_values(inner, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        for index, inner in enumerate(value):
            yield from leaf_values(inner, f"{at}[{index}]")
    else:
        yield at, value


def bare_key(key: str) -> str:
    """Return a key with its list indices left out.

    Examples:
        >>> bare_key("datasets[0].path")
        'datasets[].path'
    """
    return "".join("[" + part[part.index("]") :] if "]" in part else part for part in key.replace("[", "\0[").split("\0"))


def rule_of(rules: Mapping[str, Rule], key: str) -> tuple[str, Rule | None]:
    """Return the rule of a key, or of the nearest mapping around it that has one, and the rule's name."""
    name = bare_key(key)
    while name:
        if name in rules:
            return name, rules[name]
        name = name[:-2] if name.endswith("[]") else name.rpartition(".")[0]
    return "", None
