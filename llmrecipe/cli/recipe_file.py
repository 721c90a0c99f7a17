"""The file of a recipe that a verb writes: its name, what names it on the command line, and the writing itself."""

from __future__ import annotations

import re
from pathlib import Path

from llmrecipe.core.errors import RecipeError


def recipe_word(path: Path) -> str:
    """Return what stands behind `recipe=` for a file."""
    return path.stem if path.parent == Path("recipes") else str(path)


def write_recipe(path: Path, text: str) -> None:
    """Write a file and the folders above it.

    Raises:
        RecipeError: the disk refuses it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"{path}: cannot be written: {error.strerror}. Give the command in a folder that you may write to, or name one: "
            f"`new FOLDER/{path.name}`, `migrate --out FOLDER/{path.name}`"
        ) from error


def free_name(stem: str) -> str:
    """Return a name for a recipe after a file: letters, digits and _, and no packaged recipe's.

    Examples:
        >>> free_name("my rows-v2"), free_name("sft"), free_name("2024")
        ('my_rows_v2', 'sft_rows', 'rows_2024')
    """
    from llmrecipe.recipe.recipe_paths import packaged, recipes_in

    name = re.sub(r"\W+", "_", stem, flags=re.ASCII).strip("_").lower() or "rows"
    name = name if name[0].isalpha() else f"rows_{name}"
    taken = {path.stem for path in recipes_in(packaged()).values()}
    return f"{name}_rows" if name in taken else name
