"""The recipe under which a finished run or a plain model is evaluated."""

from __future__ import annotations

from pathlib import Path

from llmrecipe.core.errors import UserError
from llmrecipe.models.checkpoint_path import run_folder
from llmrecipe.recipe.compose import Composition, compose
from llmrecipe.recipe.overrides import as_word


def recipe_of(path: str, overrides: list[str]) -> Composition:
    """Return the recipe that an evaluation of a run or model follows: the run's own, or the defaults for a plain model."""
    final = run_folder(path)
    if final is None:
        return compose("base", [as_word(("model", "path"), path), *overrides])
    recipe = Path(path) / "recipe.yaml"
    if not recipe.is_file():
        recipe = Path(path).parent / "recipe.yaml"
    if not recipe.is_file():
        raise UserError(
            f"{path}: the run has no recipe.yaml, so it does not say what to evaluate; give data.path and objective"
        )
    # The run's folder holds its tokenizer, trained or not.
    words = [as_word(("model", "path"), path), "model.continue=false", "tokenizer.train=null"]
    if (final / "model").is_dir():
        # The run left a whole model: how its base was made (fresh weights, config values) is no longer needed to load it.
        words += ["model.init=pretrained", "~model.config"]
    return compose(recipe, [*words, *overrides], foreign=True)
