"""What steps share that search over a recipe and leave the run of the best."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from llmrecipe.recipe.compose import Composition


class SearchedRecipe:
    """A step whose result is a run of its `recipe`; mixed into `Step`s."""

    result: ClassVar[str]

    recipe: str
    words: list[str]

    def composed(self) -> Composition:
        """Return the composed recipe with its overrides.

        Raises:
            RecipeError: it does not exist, or is wrong.
        """
        from llmrecipe.recipe.compose import compose

        return compose(self.recipe, self.words)

    def stands_on(self) -> Mapping[str, Any]:
        """Return the composed recipe."""
        mapping = self.composed().mapping
        return {"composed": {k: v for k, v in mapping.items() if k not in ("run", "log")}}

    def model_section(self) -> Mapping[str, Any]:
        """Return the recipe's `model` section."""
        return self.composed().mapping["model"]

    def link_best(self, folder: Path, run: str) -> None:
        """Make the run of the best the result of the step's folder; a folder that is moved as a whole keeps it."""
        link = folder / self.result
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(run, folder), target_is_directory=True)
