"""What a recipe may interpolate: another value (`${data.max_length}`) and, in the stages of a pipeline, the result of a stage
(`${stage:sft}`) or the value of an axis (`${matrix:seed}`). Where a secret is wanted (an option `key`) it names the environment
variable that holds it, `${oc.env:NAME}`, which stays as it is until the secret is used."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.core.redact import SECRET, variable_of
from llmrecipe.recipe.provenance import Origins, leaves, origin_of
from llmrecipe.recipe.yaml_file import LARGEST, KeyPath, YamlFile, dotted

CIRCLE = "names itself in a circle"
PIECE = re.compile(r"(?<!\\)\$\{([^}]*)\}?")
PLAIN = re.compile(r"^\.*[A-Za-z_][\w]*(\.[\w]+)*$")
STAGE = re.compile(r"^(?:stage|matrix):\s*([A-Za-z_][\w-]*)$")


def interpolate(mapping: dict[str, Any], origins: Origins) -> dict[str, Any]:
    """Replace every `${a.b}` by the value it names; `${stage:x}` and `${matrix:x}` stay for the pipeline to fill in, and
    `${oc.env:NAME}` for whoever uses the secret.

    Raises:
        RecipeError: anything else inside `${...}`, a name that does not exist, or values that name each other in a circle.
    """
    texts = [(key, text) for key, text in _texts(mapping) if "${" in text]
    wrong = [message for key, text in texts if (message := _refuse(mapping, key, text))]
    if wrong:
        raise RecipeError("\n".join(f"{m}{_at(origins, key)}" for m, key in wrong))
    if not texts:
        return mapping
    _refuse_growth(mapping, texts, origins)
    shielded = _each(mapping, lambda text, key: PIECE.sub(lambda m: "\0" + m[1] + "\1" if _stays(m, key) else m[0], text))
    config = OmegaConf.create(shielded)
    for key, text in texts:
        try:
            _resolve(config, key)
        except (OmegaConfBaseException, RecursionError) as error:
            reason = (
                CIRCLE if isinstance(error, RecursionError) or "recurs" in str(error).lower() else str(error).split("\n")[0]
            )
            raise RecipeError(f"{dotted(key)}: {text} {reason}{_at(origins, key)}") from error
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return _each(resolved, lambda text, key: text.replace("\0", "${").replace("\1", "}"))


def _refuse_growth(mapping: dict[str, Any], texts: list[tuple[KeyPath, str]], origins: Origins) -> None:
    """Refuse interpolations that would write out more than `LARGEST` characters: names of names grow without end.

    Raises:
        RecipeError: naming the value; also one that names others too deep to be followed.
    """
    sizes: dict[KeyPath, int] = {}

    def size_at(at: KeyPath, value: object) -> int:
        if at not in sizes:
            sizes[at] = 0  # a circle adds nothing; it is refused when it is resolved
            sizes[at] = size_of(at, value)
        return sizes[at]

    def size_of(at: KeyPath, value: object) -> int:
        if isinstance(value, dict):
            return sum(size_at((*at, str(key)), inner) for key, inner in value.items())
        if isinstance(value, list):
            return sum(size_at((*at, index), inner) for index, inner in enumerate(value))
        if not isinstance(value, str) or "${" not in value:
            return 1 + len(str(value))
        return 1 + len(value) + sum(named(at, match) for match in PIECE.finditer(value) if not _stays(match, at[-1]))

    def named(at: KeyPath, piece: re.Match[str]) -> int:
        inside = piece[1].strip()
        up = len(inside) - len(inside.lstrip("."))
        node: Any = mapping
        parts: list[str | int] = [*(at[:-up] if up else ()), *inside.lstrip(".").split(".")]
        for index, part in enumerate(parts):
            if isinstance(node, list) and str(part).isdigit() and int(part) < len(node):
                parts[index] = int(part)
                node = node[int(part)]
            elif isinstance(node, dict) and part in node:
                node = node[part]
            else:
                return 0
        return size_at(tuple(parts), node)

    total = 0
    for key, text in texts:
        try:
            total += size_at(key, text)
        except RecursionError as error:
            raise RecipeError(f"{dotted(key)}: {text} {CIRCLE}{_at(origins, key)}") from error
        if total > LARGEST:
            raise RecipeError(
                f"{dotted(key)}: written out, the values that are named with ${{...}} have more than {LARGEST >> 20} million "
                f"characters{_at(origins, key)}"
            )


def _resolve(config: DictConfig | ListConfig, key: KeyPath) -> None:
    """Read a value, which raises what is wrong with its interpolation."""
    node: Any = config
    for part in key:
        node = node[part]


def _texts(value: object, at: KeyPath = ()) -> list[tuple[KeyPath, str]]:
    found: list[tuple[KeyPath, str]] = []
    for key, leaf in leaves(value, at):
        if isinstance(leaf, str):
            found.append((key, leaf))
        elif isinstance(leaf, list):
            for index, item in enumerate(leaf):
                found += _texts(item, (*key, index))
    return found


def _each(mapping: Mapping[Any, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """Return a mapping with a function of (text, key) applied to every string in it, at any depth."""
    return {key: _each_in(value, change, str(key)) for key, value in mapping.items()}


def _each_in(value: object, change: Callable[[str, str], str], key: str = "") -> object:
    if isinstance(value, dict):
        return _each(value, change)
    if isinstance(value, list):
        return [_each_in(v, change) for v in value]
    return change(value, key) if isinstance(value, str) else value


def _stays(piece: re.Match[str], key: object) -> bool:
    """Return whether an interpolation is written as it is: a stage's result, or the variable of a secret."""
    return bool(STAGE.match(piece[1].strip())) or (key == SECRET and variable_of(piece[0]) is not None)


def _refuse(mapping: dict[str, Any], key: KeyPath, text: str) -> tuple[str, KeyPath] | None:
    wrong = _syntax(text, key[-1])
    if wrong is not None:
        return f"{dotted(key)}: {wrong}", key
    for match in PIECE.finditer(text):
        inside = match[1].strip()
        if not _stays(match, key[-1]) and not inside.startswith(".") and (near := _missing(mapping, inside)) is not None:
            return f"{dotted(key)}: ${{{inside}}} names no key of this recipe{near}", key
    return None


def _syntax(text: str, key: object) -> str | None:
    """Return what is wrong with the syntax of the interpolations of a text under a key, or None."""
    for match in PIECE.finditer(text):
        inside = match[1].strip()
        if not match[0].endswith("}"):
            return f"'{text}' has ${{ without a closing brace; write \\${{ for the characters themselves"
        if not _stays(match, key) and not PLAIN.match(inside):
            allowed = (
                f"another key, as in ${{data.max_length}}, ${{stage:NAME}}, or under '{SECRET}' a variable ${{oc.env:NAME}}"
            )
            return f"${{{inside}}} is not allowed; a recipe names only {allowed}"
    return None


def check_file(source: YamlFile) -> YamlFile:
    """Refuse a file with an invalid interpolation, before Hydra reads it.

    Raises:
        RecipeError: every such value, with its line.
    """
    found = [(key, _syntax(text, key[-1])) for key, text in _texts(source.value) if "${" in text]
    wrong = [f"{dotted(key)}: {message} [{source.where(*key)}]" for key, message in found if message]
    if wrong:
        raise RecipeError("\n".join(wrong))
    return source


def _missing(mapping: dict[str, Any], path: str) -> str | None:
    """Return None where the path exists, else a hint."""
    node: Any = mapping
    for part in path.split("."):
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            return did_you_mean(part, [str(k) for k in node]) if isinstance(node, dict) else ""
    return None


def _at(origins: Origins, key: KeyPath) -> str:
    origin = origin_of(origins, key)
    return f" [{origin}]" if origin else ""


def escape(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Invert `interpolate` for writing a mapping: escape plain `${` with a backslash; stages and variables stay."""
    return _each(mapping, lambda text, key: PIECE.sub(lambda m: m[0] if _stays(m, key) else "\\" + m[0], text))
