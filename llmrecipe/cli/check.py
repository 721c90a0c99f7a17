"""`llmrecipe check`."""

from __future__ import annotations

from llmrecipe.cli.words import Json, Words, need_recipe, sort_words

PANEL = "Train"
ORDER = 2


def verb(words: Words = None, as_json: Json = False) -> None:
    """Validate a recipe and build it without weights: stack order, trained tensors, memory, data."""
    request = sort_words(words)
    recipe = need_recipe(request, "check")
    from llmrecipe.recipe.compose import compose

    # Mistakes in the recipe come first, before anything about the machine or the model.
    compose(recipe, request.overrides)
    from llmrecipe.training.check import check_recipe

    check_recipe(recipe, request.overrides, as_json=as_json)
