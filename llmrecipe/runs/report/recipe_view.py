"""A run's recipe with what was set for it marked, and its differences from the run it goes on from."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrecipe.core.console import value_text
from llmrecipe.runs.run_dir import started_in
from llmrecipe.runs.run_record import SILENT, Record, differences, flat, read_run

KEY = re.compile(r"""^( *)(?:"([^"]+)"|'([^']+)'|([^\s:#\[{-][^:]*)):(?: |$)""")
"""A line of YAML that begins with a key."""


@dataclass(frozen=True)
class RecipeView:
    """What the section about the recipe shows."""

    changes: list[list[str]]
    """Key, value and what set it, with a header; empty where everything is inherited."""
    parent: list[list[str]]
    """Key, value in the run that this one goes on from, and value here, with a header; empty without such a run."""
    lines: list[tuple[str, bool]]
    """The whole recipe line by line, and whether the value was set for this run."""


def recipe_view(record: Record, report: dict[str, Any], text: str, command: str) -> RecipeView:
    """Return a run's recipe.

    Args:
        report: its `report.json`, whose `recipe` names what set each value; without it the overrides of the command count.
        text: its `recipe.yaml`.
        command: its `command.txt`.
    """
    known = (report.get("recipe") or {}).get("set")
    given: dict[str, str] = known if known is not None else _overrides(command)
    values = flat(record.recipe)
    set_here = {k: value_text(v) for k, v in values.items() if _within(k, given) and k.split(".")[0] not in SILENT}
    rows = [[key, value, given[_within(key, given)]] for key, value in set_here.items()]
    return RecipeView([["key", "value", "set by"], *rows] if rows else [], _against_parent(record), marked_lines(text, given))


def marked_lines(text: str, given: dict[str, str]) -> list[tuple[str, bool]]:
    """Return the lines of a YAML mapping and whether each belongs to one of the given keys.

    Examples:
        >>> marked_lines("optim:\\n  lr: 1\\n  list:\\n  - a\\nseed: 0\\n", {"optim.list": "", "seed": ""})
        [('optim:', False), ('  lr: 1', False), ('  list:', True), ('  - a', True), ('seed: 0', True)]
    """
    above: list[tuple[int, str]] = []
    found = []
    for line in text.splitlines():
        if (match := KEY.match(line)) is not None:
            depth, name = len(match[1]), next(part for part in match.groups()[1:] if part)
            while above and above[-1][0] >= depth:
                above.pop()
            above.append((depth, name))
        found.append((line, bool(_within(".".join(name for _, name in above), given))))
    return found


def _within(key: str, given: dict[str, str]) -> str:
    """Return the given key that a key is or is below of; empty where there is none."""
    parts = key.split(".")
    return next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in given), "")


def _overrides(command: str) -> dict[str, str]:
    """Return key -> word of the overrides in the lines of a command file."""
    try:
        words = [word for line in command.splitlines() for word in shlex.split(line)]
    except ValueError:
        return {}
    pairs = [word.lstrip("+").partition("=") for word in words if "=" in word and not word.startswith("-")]
    return {key: f"override {key}={value}" for key, _, value in pairs if key not in ("recipe", "resume")}


def _against_parent(record: Record) -> list[list[str]]:
    path = (record.recipe.get("model") or {}).get("path")
    if not isinstance(path, str):
        return []
    place = (started_in(record.path) or Path()) / path
    if not (place / "recipe.yaml").is_file() or not (place / "status.json").is_file():
        return []
    rows = differences([read_run(place), record])
    return [["key", f"in {path}", "here"], *([key, *map(value_text, values)] for key, values in rows.items())]
