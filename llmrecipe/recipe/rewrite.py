"""A recipe file in old words, rewritten in new ones: the words change where they stand, everything else stays as it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llmrecipe.core.errors import RecipeError
from llmrecipe.recipe.renames import RENAMES, VALUES, new_path, new_words
from llmrecipe.recipe.yaml_file import parse_yaml, read_yaml, short


@dataclass(frozen=True)
class Rewritten:
    """The text of a recipe in new words, and a line for each word that changed."""

    text: str
    notes: list[str]


def rewrite_recipe(path: Path) -> Rewritten | None:
    """Return a recipe file in new words; None where it holds no old one.

    Raises:
        RecipeError: the file cannot be read, or a word stands where it cannot be changed by itself, such as twice in a line.
    """
    source = read_yaml(path)
    notes: list[str] = []
    wanted = new_words(source.value, notes)
    if not notes:
        return None
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for key, number in source.lines.items():
        old, new = key[-1] if key else None, new_path(key, source.value)[-1:]
        if new and old != new[0]:
            lines[number - 1] = re.sub(
                rf"(?<![\w.])([\"']?){re.escape(str(old))}(?=\1\s*:)", rf"\g<1>{new[0]}", lines[number - 1]
            )
        for value in VALUES:
            if key[-2:] == value.key:
                old = rf"(?<![\w.])([\"']?{value.key[-1]}[\"']?\s*:\s*){_word(value.old)}(?!\w)"
                lines[number - 1] = re.sub(old, rf"\g<1>{value.new}", lines[number - 1])
    text = "".join(lines)
    for rename in RENAMES:
        if rename.reference:
            text = re.sub(rf"\$\{{\s*{re.escape(rename.old)}:", f"${{{rename.new}:", text)
    if parse_yaml(text, path).value != wanted:
        raise RecipeError(f"{short(path)}: change these words by hand:\n  " + "\n  ".join(notes))
    return Rewritten(text, notes)


def _word(value: bool) -> str:
    """Return a regular expression of the ways to write true or false in YAML."""
    word = str(value)
    return f"(?:{word.lower()}|{word}|{word.upper()})"
