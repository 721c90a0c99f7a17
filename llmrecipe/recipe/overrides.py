"""Overrides of the command line: `optim.lr=1e-4 stack=[nf4,lora] ~stack.lora '+stack.top={kind: lora}'`.

Hydra's grammar parses them. Choices of a group go back to Hydra; values are set here, so that an unknown key is reported by
`recipe.validate` (with similar names, all mistakes at once) and a mapping given for one option replaces it instead of being
merged into it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.recipe.provenance import Origin, Origins, forget, leaves
from llmrecipe.recipe.recipe_paths import COMPONENT_GROUPS, GROUPS, presets
from llmrecipe.recipe.renames import new_path, new_value
from llmrecipe.recipe.yaml_file import DEEPEST, KeyPath, dotted


@dataclass(frozen=True)
class Word:
    """One parsed override."""

    text: str
    key: KeyPath
    value: Any
    delete: bool
    choice: bool
    """Whether it chooses an option of a group rather than setting a value."""


RESERVED = ("hydra", "recipe", "resume")
"""Keys of a command line that set nothing in a recipe."""


def parse_overrides(words: list[str], reserved: tuple[str, ...] = RESERVED) -> list[Word]:
    """Parse the overrides of a command line.

    Args:
        reserved: keys that cannot be set.

    Raises:
        RecipeError: a word that is not `key=value`, `+key=value` or `~key`, or one that lists several values.
    """
    return [_word(text, reserved) for text in words]


def _word(text: str, reserved: tuple[str, ...]) -> Word:
    bare = text.lstrip("+~")
    if "=" not in text and not text.startswith("~"):
        near = " (options start with --, such as --json)" if text.startswith("-") else ""
        raise RecipeError(f"'{text}': an override is key=value, +key=value or ~key{near}; nothing was set")
    if bare.split("=")[0].split(".")[0] in reserved:
        raise RecipeError(f"'{text}': {bare.split('=')[0].split('.')[0]} cannot be set by an override")
    if _depth(text) > DEEPEST:
        raise RecipeError(f"'{text[:60]}...': nested deeper than {DEEPEST} levels")
    try:
        parsed = OverridesParser.create().parse_overrides([text])[0]
        sweep = parsed.is_sweep_override()
        value = None if sweep else _plain(parsed.value())
    except (HydraException, OmegaConfBaseException, RecursionError, ValueError) as error:
        key = bare.split("=")[0]
        raise RecipeError(
            f"'{text}': this override cannot be read ({_syntax(text)}); quote a value with special characters: "
            f"'{key}=\"...\"', write a list as '{key}=[a, b]' and a mapping as '{key}={{a: 1}}'"
        ) from error
    if sweep:
        key, _, given = text.partition("=")
        raise RecipeError(
            f"'{text}': expected one value, got several; to train with each of them write `llmrecipe train -m ... {text}`; "
            f"a list is written '{key}=[{given}]'"
        )
    return _classify(text, parsed, value)


def _depth(text: str) -> int:
    """Return how deep brackets and braces of a word are nested."""
    level = deepest = 0
    for character in text:
        level += (character in "[{(") - (character in "]})")
        deepest = max(deepest, level)
    return deepest


def _classify(text: str, parsed: Override, value: object) -> Word:
    name = parsed.get_key_element().lstrip("+~")
    key: KeyPath = tuple(name.replace("/", ".").split("."))
    if name not in GROUPS:
        return Word(text, key, value, parsed.is_delete(), False)
    if parsed.is_delete():
        raise RecipeError(f"'{text}': {name} cannot be removed as a whole; write {name}={'[]' if name == 'stack' else 'NAME'}")
    if name == "stack":
        value = [] if value in (None, "", "none") else [value] if isinstance(value, str) else value
        if not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise RecipeError(
                f"'{text}': stack= takes a list of methods, as in stack=[nf4,lora]; a named one is '+stack.NAME={{kind: ...}}'"
            )
        repeated = next((v for v in value if value.count(v) > 1), None)
        if repeated:
            raise RecipeError(f"'{text}': '{repeated}' is listed twice; add the second as '+stack.NAME={{kind: {repeated}}}'")
    elif not isinstance(value, str):
        if isinstance(value, dict):
            return Word(text, key, value, False, False)
        raise RecipeError(f"'{text}': {name}= takes one name; got {value!r}")
    return Word(text, key, value, False, True)


def _syntax(text: str) -> str:
    pairs = (("{", "}"), ("[", "]"), ("(", ")"))
    for left, right in pairs:
        if text.count(left) != text.count(right):
            return f"'{left}' and '{right}' do not match"
    return "an unclosed quote" if text.count("'") % 2 or text.count('"') % 2 else "a character reserved by Hydra's grammar"


def _plain(value: object) -> object:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, dict):
        return {str(_plain(k)): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def hydra_words(words: list[Word]) -> list[str]:
    """Return the choices of components in Hydra's syntax; presets are placed by the defaults chain."""
    last = chosen(words)
    return [f"{group}={_choice_text(word.value)}" for group, word in last.items() if not _is_preset(group, word.value)]


def _is_preset(group: str, value: object) -> bool:
    return isinstance(value, str) and value in presets(group)


def _choice_text(value: object) -> str:
    return f"[{','.join(value)}]" if isinstance(value, list) else str(value)


def apply(words: list[Word], mapping: dict[str, Any], origins: Origins, notes: list[str]) -> None:
    """Set and remove the values the command line names, in order, in place.

    Args:
        notes: gains one line for each word that has a newer name.

    Raises:
        RecipeError: a key below something that is not a mapping, or the removal of what is not there.
    """
    for word in words:
        if word.choice:
            _choose(word, mapping, origins)
            continue
        word = _renamed(word, mapping, notes)
        node = _parent(word, mapping)
        last: Any = word.key[-1]
        if word.delete:
            if last not in node:
                raise RecipeError(
                    f"'{word.text}': there is no {'.'.join(map(str, word.key))} to remove{did_you_mean(str(last), node)}"
                )
            del node[last]
            forget(origins, word.key)
            continue
        merge = isinstance(word.value, dict) and isinstance(node.get(last), dict) and _holds_keys(word.key)
        if not merge:
            forget(origins, word.key)
            node[last] = word.value
        else:
            node[last] = {**node[last], **word.value}
        for key, _ in leaves(word.value):
            forget(origins, (*word.key, *key))
            origins[(*word.key, *key)] = Origin("override", word=word.text)


def _renamed(word: Word, mapping: dict[str, Any], notes: list[str]) -> Word:
    key = new_path(word.key, mapping)
    if key != word.key:
        notes.append(f"{dotted(word.key)} is called {dotted(key)}")
    return dataclasses.replace(word, key=key, value=new_value(word.value, notes, key))


def _choose(word: Word, mapping: dict[str, Any], origins: Origins) -> None:
    """Set the kind the command line chose, even where a file names another one in its body."""
    group = str(word.key[0])
    body = mapping.get(group)
    if group in COMPONENT_GROUPS and group != "stack" and isinstance(body, dict) and not _is_preset(group, word.value):
        body["kind"] = word.value
        origins[(group, "kind")] = Origin("override", word=word.text)


def _holds_keys(key: KeyPath) -> bool:
    """Return whether a mapping given for a key adds to it (section, component, stack entry) rather than replacing it."""
    return len(key) == 1 or (key[0] == "stack" and len(key) == 2)


def _parent(word: Word, mapping: dict[str, Any]) -> dict[str, Any]:
    node: dict[Any, Any] = mapping
    for depth, part in enumerate(word.key[:-1]):
        if word.delete and part not in node:
            raise RecipeError(
                f"'{word.text}': there is no {'.'.join(map(str, word.key[: depth + 1]))}{did_you_mean(str(part), node)}"
            )
        inner = node.get(part)
        if inner is None:
            inner = node[part] = {}
        if not isinstance(inner, dict):
            above = ".".join(map(str, word.key[: depth + 1]))
            raise RecipeError(f"'{word.text}': {above} is {inner!r}, which has no keys below it")
        node = inner
    return node


def chosen(words: list[Word]) -> dict[str, Word]:
    """Map each group to the last override that chose it."""
    return {str(word.key[0]): word for word in words if word.choice}


def split_sweeps(words: list[str]) -> tuple[list[str], dict[str, list[Any]]]:
    """Split overrides into those that set one value, and the axes of a sweep: key -> its values, in the order of the words.

    Several values are written as in Hydra: `a,b`, `choice(a,b)`, `range(1,4)`, `sort(3,1)`.

    Raises:
        RecipeError: several values without an order (`interval`, `glob`, `shuffle`), or a key that is swept twice.
    """
    plain: list[str] = []
    axes: dict[str, list[Any]] = {}
    for text in words:
        try:
            parsed = OverridesParser.create().parse_overrides([text])[0] if _depth(text) <= DEEPEST else None
        except (HydraException, OmegaConfBaseException, RecursionError, ValueError):
            parsed = None
        if parsed is None or not parsed.is_sweep_override():
            plain.append(text)  # what cannot be read is refused where overrides are parsed
            continue
        key = parsed.get_key_element().lstrip("+~").replace("/", ".")
        given = text.partition("=")[2]
        if not (parsed.is_choice_sweep() or parsed.is_range_sweep()) or given.startswith("shuffle("):
            raise RecipeError(
                f"'{text}': a grid needs its values one by one, as in {key}=a,b or {key}=range(1,4); "
                "ranges without steps are for `llmrecipe search`"
            )
        if key in axes:
            raise RecipeError(f"'{text}': {key} is swept twice")
        axes[key] = [_plain(value) for value in parsed.sweep_iterator(lambda element: element)]
    return plain, axes


QUOTED = re.compile(r'(\\*)("|\Z)')


SPECIAL = re.compile(r"[\\()\[\]{}:=, \t]")
"""Characters that Hydra reads in an unquoted key of a mapping."""


def as_word(key: KeyPath, value: object) -> str:
    """Return a value as an override of the command line."""
    return f"{dotted(key)}={word_text(value)}"


def word_text(value: object) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, str):
        # Backslashes count double where a quote follows, and only there.
        return '"' + QUOTED.sub(lambda m: m[1] * 2 + ('\\"' if m[2] else ""), value) + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(word_text, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{SPECIAL.sub(_escaped, str(k))}: {word_text(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


def _escaped(found: re.Match[str]) -> str:
    return "\\" + found[0]
