"""`llmrecipe search`."""

from __future__ import annotations

from llmrecipe.cli.words import Json, Words, need_recipe, print_json, sort_words

PANEL = "Train"
ORDER = 4


def verb(words: Words = None, as_json: Json = False) -> None:
    """Search the space a recipe gives under `search`, and write the best as a plain recipe; the same command goes on."""
    from llmrecipe.errors import RecipeError
    from llmrecipe.recipe.compose import compose

    request = sort_words(words)
    if request.resume is not None:
        raise RecipeError("resume=: a search goes on by its own words: the same command, and the trials there are kept")
    recipe = need_recipe(request, "search")
    # Mistakes in the recipe come first, before anything about the machine or the model.
    compose(recipe, request.overrides)
    from llmrecipe.search.show import picture, table
    from llmrecipe.search.study import search

    found, trials = search(recipe, request.overrides)
    best = found.best(trials)
    path, image = found.write_best(best, trials), picture(found, trials)
    if as_json:
        from dataclasses import asdict

        print_json({"best": asdict(best), "recipe": str(path), "trials": [asdict(t) for t in trials]})
        return
    table(found, trials)
    if image is not None:
        print(f"picture: {image}")
    print(f"done: {path}")
