"""Completion at the prompt: recipes, dotted keys with their values, folders of runs; and how bash gets them.

Bash splits a command at `=` and `:` first, so `recipe=sf` arrives as three words, and what it gets back replaces the last of
them alone. Zsh and fish pass words as they are typed.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from llmrecipe.core.console import value_text

VARIABLE = "_LLMRECIPE_COMPLETE"
"""The environment variable by which a shell requests completions."""
BREAKS = "=:"
DEPTH = 3
"""Levels of folders that are searched for runs."""
MOST = 200
"""Folders that are looked at."""
PATHS = ("resume", "path", "dir")
"""Last part of the keys whose value is a folder."""


def complete_word(incomplete: str, others: Sequence[str] = ()) -> list[str]:
    """Return the completions of a word: recipe names, choices of a group, dotted keys, values of a key.

    A key that is alone is offered with its values, too: with one completion the shell would put a space behind the `=`.

    Args:
        others: the words before it, of which `recipe=` says which options the components have.
    """
    key, equals, typed = incomplete.partition("=")
    if equals:
        return [f"{key}={value}" for value in _values(key, typed, others) if value.startswith(typed)]
    found = [path for path in _keys(incomplete, others) if path.startswith(incomplete)]
    if len(found) == 1:
        found += [f"{found[0]}{value}" for value in _values(found[0][:-1], "", others)][:MOST]
    return found


def complete_override(context: typer.Context, incomplete: str) -> list[str]:
    """Return the completions of a word behind a verb."""
    return complete_word(incomplete, context.params.get("words") or ())


def complete_run(incomplete: str) -> list[str]:
    """Return the folders of runs that begin like a word."""
    return [path for path in _runs(incomplete) if path.startswith(incomplete)]


def _keys(incomplete: str, others: Sequence[str]) -> list[str]:
    from llmrecipe.recipe.recipe_paths import GROUPS

    paths = ["recipe=", "resume=", *(f"{group}=" for group in GROUPS)]
    for section, value in _defaults(others if "." in incomplete else ()).items():
        paths += list(_leaves(section, value)) or [f"{section}="]
    return list(dict.fromkeys(paths))


def _leaves(path: str, value: object) -> Iterator[str]:
    """Yield the dotted keys of a mapping and of the mappings in it, `=` behind each."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}", inner)
    else:
        yield f"{path}="


def _defaults(others: Sequence[str]) -> dict[str, Any]:
    """Return the values of the recipe among the other words, its components included; without one, the defaults of sections."""
    from llmrecipe.core.errors import LlmRecipeError
    from llmrecipe.recipe.compose import compose, section_defaults

    recipe = next((word.partition("=")[2] for word in others if word.startswith("recipe=")), None)
    if recipe:
        # What is wrong with it is said when the command is given.
        with contextlib.suppress(LlmRecipeError, OSError):
            return compose(
                recipe, [word for word in others if "=" in word and not word.startswith(("recipe=", "resume="))]
            ).mapping
    return section_defaults()


def _values(key: str, typed: str, others: Sequence[str]) -> list[str]:
    """Return what a key may be: names, the values of a choice, folders; else the value it has."""
    from llmrecipe.core import registry
    from llmrecipe.recipe.recipe_paths import GROUPS, all_recipes, presets

    if key == "recipe":
        return [*all_recipes(), *_files(typed, ".yaml")]
    if key in GROUPS:
        return sorted({*presets(key), *registry.names(key)})
    if key.rpartition(".")[2] in PATHS:
        return [*_runs(typed), *_files(typed, "")]
    mapping = _defaults(others)
    if choices := _choices(key, mapping):
        return choices
    value: Any = mapping
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return [] if value is None or isinstance(value, list | dict) else [value_text(value)]


def _choices(key: str, mapping: dict[str, Any]) -> list[str]:
    """Return the values of a key that is a choice or a switch."""
    from llmrecipe.core import registry
    from llmrecipe.recipe.recipe_paths import COMPONENT_GROUPS
    from llmrecipe.recipe.schema import Recipe

    parts = key.split(".")
    group, inside = parts[0], parts[1:]
    node: Any = mapping.get(group)
    if group in COMPONENT_GROUPS:
        name = inside[0] if group == "stack" and len(inside) > 1 else None
        node = node.get(name) if name is not None and isinstance(node, dict) else node
        kind = (node or {}).get("kind", name) if isinstance(node, dict) else name
        if kind not in registry.names(group):
            return []
        schema = registry.spec(group, str(kind)).schema_model.model_json_schema(by_alias=True)
        inside = inside[1:] if name is not None else inside
    else:
        schema, inside = Recipe.model_json_schema(by_alias=True), parts
    return _enumerated(schema, inside, schema.get("$defs", {}))


def _enumerated(schema: dict[str, Any], parts: Sequence[str], definitions: dict[str, Any]) -> list[str]:
    """Return the choices at a place of a JSON Schema."""
    schema = definitions.get(str(schema.get("$ref", "")).rpartition("/")[2], schema)
    options = [schema, *schema.get("anyOf", []), *schema.get("allOf", [])]
    if parts:
        inner = [
            one["properties"][parts[0]] for one in _resolved(options, definitions) if parts[0] in one.get("properties", {})
        ]
        return list(dict.fromkeys(value for one in inner for value in _enumerated(one, parts[1:], definitions)))
    found: list[str] = []
    for one in _resolved(options, definitions):
        found += [str(value) for value in one.get("enum", [])] + ([str(one["const"])] if "const" in one else [])
        found += ["true", "false"] if one.get("type") == "boolean" else []
    return found


def _resolved(options: Sequence[dict[str, Any]], definitions: dict[str, Any]) -> list[dict[str, Any]]:
    return [definitions.get(str(one.get("$ref", "")).rpartition("/")[2], one) for one in options]


def _files(typed: str, ending: str) -> list[str]:
    """Return the files and folders that begin like a path, a `/` behind folders; nothing before anything is typed."""
    if not typed:
        return []
    above = Path(typed).expanduser().parent if not typed.endswith("/") else Path(typed).expanduser()
    front = typed[: len(typed) - len(typed.rpartition("/")[2])]
    with contextlib.suppress(OSError):
        inside = sorted(above.iterdir())[:MOST]
        return [f"{front}{p.name}{'/' if p.is_dir() else ''}" for p in inside if p.is_dir() or p.name.endswith(ending)]
    return []


def _runs(typed: str) -> list[str]:
    """Return the folders of runs below the folder that a path begins with."""
    front = typed[: len(typed) - len(typed.rpartition("/")[2])]
    found: list[str] = []
    places = [(Path(front or ".").expanduser(), front, 0)]
    looked = 0
    while places and looked < MOST:
        place, name, depth = places.pop(0)
        with contextlib.suppress(OSError):
            for inner in sorted(p for p in place.iterdir() if p.is_dir() and not p.name.startswith(".")):
                looked += 1
                if (inner / "status.json").is_file():
                    found.append(f"{name}{inner.name}")
                elif depth < DEPTH:
                    places.append((inner, f"{name}{inner.name}/", depth + 1))
    return found


# --- bash ------------------------------------------------------------------------------------------------------------


def whole_words(pieces: Sequence[str], at: int) -> tuple[list[str], str]:
    """Return the words that bash has split, and what stands before the last piece in the last word.

    Args:
        pieces: of the command, split at `=` and `:`.
        at: number of the piece that is completed.

    Examples:
        >>> whole_words(["llmrecipe", "train", "recipe", "=", "sf"], 4)
        (['llmrecipe', 'train', 'recipe=sf'], 'recipe=')
        >>> whole_words(["llmrecipe", "train", "recipe", "="], 3)
        (['llmrecipe', 'train', 'recipe='], 'recipe=')
    """
    pieces = [*pieces[: at + 1], *([""] if at >= len(pieces) else [])]
    words: list[str] = []
    kept = ""
    for number, piece in enumerate(pieces):
        breaks = bool(piece) and not piece.strip(BREAKS)
        behind = number > 0 and bool(pieces[number - 1]) and not pieces[number - 1].strip(BREAKS)
        if words and (breaks or behind):
            kept = words[-1] + (piece if breaks else "")
            words[-1] += piece
        else:
            kept = ""
            words.append(piece)
    return words, kept


@contextlib.contextmanager
def answering_bash() -> Iterator[None]:
    """Give bash's question in whole words to what answers it, and take from each answer what bash already has."""
    if os.environ.get(VARIABLE) != "complete_bash":
        yield
        return
    words, kept = whole_words(os.environ.get("COMP_WORDS", "").split("\n"), int(os.environ.get("COMP_CWORD", "0")))
    os.environ |= {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            yield
    finally:
        for line in out.getvalue().splitlines():
            print(line.removeprefix(kept))
