"""Reading one YAML file and recording the line of every value.

Scalars follow YAML 1.2 with two additions: `1e-5` and `1_000` are numbers. `yes`, `no`, `on`, `off`, `010`, `1:30` and dates
stay text (YAML 1.1 silently turns them into booleans, octals, base-60 numbers and dates). A repeated key is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.path_hints import near_path

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of a mapping to a value."""


@dataclass(frozen=True)
class YamlFile:
    """A parsed YAML mapping and the line of each of its keys."""

    path: Path
    value: dict[str, Any]
    lines: dict[KeyPath, int]
    """Line (from 1) of every key and list entry."""

    def where(self, *key: str | int) -> str:
        """Return `file:line` of a key, or of the nearest key above it."""
        for length in range(len(key), -1, -1):
            if key[:length] in self.lines:
                return f"{short(self.path)}:{self.lines[key[:length]]}"
        return short(self.path)


LARGEST = 16 << 20
"""Bytes of the largest file that is read."""
VALUES = 100_000
"""Most values of one file, aliases written out."""
MOST = 5_000_000
"""Most values of one file that a program wrote, aliases written out."""
DEEPEST = 64
"""Deepest nesting."""
HALF = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which no file can hold as text."""
SCALARS = tuple(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null"))


class _Bounded(yaml.SafeLoader):
    """SafeLoader of bounded depth and size."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node, at most `DEEPEST` levels deep."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError(f"nested deeper than {DEEPEST} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge `<<` keys, into at most `VALUES` entries."""
        merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
        parts = [part for value in merged for part in (value.value if isinstance(value, yaml.SequenceNode) else [value])]
        # A mapping that is merged more than once is copied each time.
        if sum(len(part.value) for part in parts if isinstance(part, yaml.MappingNode)) > VALUES:
            raise yaml.YAMLError(_TOO_MANY)
        super().flatten_mapping(node)
        if len(node.value) > VALUES:
            raise yaml.YAMLError(_TOO_MANY)


class _Loader(_Bounded):
    """Loader with YAML 1.2 scalars."""

    yaml_implicit_resolvers: dict[str, Any] = {}


_TOO_MANY = f"more than {VALUES:,} values, with aliases (*name) and merges (<<) written out"


def _resolve(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{tag}", re.compile(pattern), [*first, ""] if tag == "null" else list(first)
    )


_resolve("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF")
_resolve("null", r"^(?:~|null|Null|NULL|)$", "~nN")
# Longer ones stay text: a number of thousands of digits can be read, but not written again.
_resolve("int", r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]{1,256})$", "-+0123456789")
_resolve(
    "float",
    r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
    "-+.0123456789",
)
_resolve("merge", r"^<<$", "<")


def dotted(key: KeyPath) -> str:
    """Return a key path as it is written on the command line.

    Examples:
        >>> dotted(("stack", "lora", "r"))
        'stack.lora.r'
    """
    return ".".join(map(str, key))


def short(path: Path) -> str:
    """Return a path as a person would type it: relative to the working directory where it is below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def read_yaml(path: Path) -> YamlFile:
    """Parse a recipe or preset file.

    Raises:
        RecipeError: the file cannot be read, is not YAML, repeats a key, or is not a mapping.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise RecipeError(f"{short(path)}: larger than {LARGEST >> 20} MB, too large for a recipe; is it a file of data?")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"{short(path)}: there is no such file{near_path(path)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{short(path)}: cannot be read as text: {getattr(error, 'strerror', None) or error}") from error
    return parse_yaml(text, path)


def parse_yaml(text: str, path: Path) -> YamlFile:
    """Parse the text of a recipe or preset file; errors as of `read_yaml`.

    Args:
        path: the file, for messages.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            lines: dict[KeyPath, int] = {}
            value = {} if node is None else _build(loader, node, (), lines, path)
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(_yaml_message(path, text, error)) from error
    if not isinstance(value, dict):
        raise RecipeError(
            f"{short(path)}:1: a recipe is a mapping `key: value`; this file holds {type(value).__name__} {value!r:.60}"
        )
    return YamlFile(path, value, lines)


def _build(
    loader: _Loader, node: yaml.Node, at: KeyPath, lines: dict[KeyPath, int], path: Path, parents: tuple[yaml.Node, ...] = ()
) -> object:
    if len(lines) > VALUES or len(at) > DEEPEST:
        raise yaml.YAMLError(_TOO_MANY if len(lines) > VALUES else f"nested deeper than {DEEPEST} levels")
    if any(node is parent for parent in parents):
        raise RecipeError(f"{short(path)}:{node.start_mark.line + 1}: this alias contains itself")
    known = SCALARS if isinstance(node, yaml.ScalarNode) else ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
    if node.tag not in known:
        raise RecipeError(f"{short(path)}:{node.start_mark.line + 1}: not valid YAML for a recipe: the tag {node.tag}")
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            lines[(*at, index)] = child.start_mark.line + 1
        inside = (*parents, node)
        return [_build(loader, child, (*at, index), lines, path, inside) for index, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        if HALF.search(node.value):
            where = f"{short(path)}:{node.start_mark.line + 1}: '{dotted(at)}'"
            raise RecipeError(f"{where}: half of a surrogate pair is no character: {node.value!r:.60}")
        try:
            return loader.construct_object(node)
        except (ValueError, OverflowError, KeyError) as error:
            kind = node.tag.rpartition(":")[2]
            raise RecipeError(
                f"{short(path)}:{node.start_mark.line + 1}: '{dotted(at)}': not a value of type {kind}: {node.value!r:.60}"
            ) from error
    _refuse_repeated_keys(node, at, path)
    loader.flatten_mapping(node)
    mapping: dict[str, Any] = {}
    for key, child in node.value:
        name = str(key.value)
        lines[(*at, name)] = key.start_mark.line + 1
        mapping[name] = _build(loader, child, (*at, name), lines, path, (*parents, node))
    return mapping


def _refuse_repeated_keys(node: yaml.MappingNode, at: KeyPath, path: Path) -> None:
    first: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise RecipeError(f"{short(path)}:{line}: a key must be plain text")
        if key.value in first:
            raise RecipeError(
                f"{short(path)}:{line}: '{dotted((*at, key.value))}' is given twice (first on line {first[key.value]})"
            )
        first[key.value] = line


def _yaml_message(path: Path, text: str, error: yaml.YAMLError | RecursionError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    if isinstance(error, RecursionError):
        problem = f"nested deeper than {DEEPEST} levels"
    if mark is None:
        return f"{short(path)}: not valid YAML: {problem}"
    rows = text.splitlines()
    row = rows[mark.line] if mark.line < len(rows) else ""
    hint = "; YAML indents with spaces, never tabs" if "\t" in row else ""
    return f"{short(path)}:{mark.line + 1}: not valid YAML: {problem}{hint}\n    {row.strip()[:200]}"


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every string that the reader above, or a YAML 1.1 reader, would parse as another type."""

    def ignore_aliases(self, data: object) -> bool:
        return True


for _first, _rules in _Loader.yaml_implicit_resolvers.items():
    for _tag, _pattern in _rules:
        _Dumper.add_implicit_resolver(_tag, _pattern, [_first])


def load_bounded(text: str) -> Any:  # noqa: ANN401 (what a YAML file holds)
    """Read YAML that `yaml.safe_dump` wrote, of bounded depth and size.

    Raises:
        yaml.YAMLError: it is not YAML, or too large or too deep.
    """
    loader = _Bounded(text)
    try:
        value = loader.get_single_data()
    finally:
        loader.dispose()
    left, inside = MOST, [value]
    while inside:
        one = inside.pop()
        children = [*one.values()] if isinstance(one, dict) else one if isinstance(one, list) else []
        left -= len(children)
        if left < 0:
            raise yaml.YAMLError(f"more than {MOST:,} values, with aliases (*name) written out")
        inside += children
    return value


def write_yaml(value: dict[str, Any]) -> str:
    """Return YAML text that `read_yaml` reads back as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def choice_lines(choices: Mapping[str, str | list[str]]) -> list[str]:
    """Return lines of a defaults list: what is chosen of each group instead of the extended recipe's.

    Examples:
        >>> choice_lines({"objective": "dpo", "stack": ["nf4", "lora"]})
        ['  - override /objective: dpo', '  - override /stack: [nf4, lora]']
    """
    return [f"  - override /{group}: {flow_text(value)}" for group, value in choices.items()]


def flow_text(value: object) -> str:
    """Return a value as YAML on one line, its plain words without quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{flow_text(key)}: {flow_text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow_text, value)) + "]"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_./][\w./-]*", value) and value.lower() not in YAML_WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)


YAML_WORDS = ("true", "false", "yes", "no", "on", "off", "null", "y", "n", ".", "..")
"""Plain words that YAML reads as something else than text."""
