"""`llmrecipe check`."""

from __future__ import annotations

from llmrecipe.cli.words import Json, Words, need_recipe, sort_words

PANEL = "Train"
ORDER = 2


def verb(words: Words = None, as_json: Json = False) -> None:
    """Validate a recipe and build it without weights: stack order, trained tensors, memory, data."""
    request = sort_words(words)
    recipe = need_recipe(request, "check")
    from llmrecipe.cli.preflight import composed

    # Mistakes in the recipe come first, before anything about the machine or the model.
    composition = composed(recipe, request.overrides)
    from llmrecipe.training.check import check_verb

    check_verb(composition, as_json=as_json)
