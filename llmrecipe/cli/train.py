"""`llmrecipe train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmrecipe.cli.arguments import AUTO, ConfigDir, Json, Quiet, Verbose, VerbWords, Words, need_recipe, sort_words
from llmrecipe.core.console import print_json, say, say_progress
from llmrecipe.core.lazy import without_collections

PANEL = "Train"
ORDER = 1


def verb(
    words: Words = None,
    multirun: Annotated[
        bool, typer.Option("--multirun", "-m", help="Train with every combination of values such as optim.lr=1e-3,1e-4.")
    ] = False,
    config_dir: ConfigDir = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Run a recipe, or all stages of a pipeline recipe.

    `resume=RUN_DIR` continues a run; with `resume=auto` the same command starts the run in `run.dir` and continues it.
    `-m optim.lr=1e-3,1e-4 stack=[lora],[dora]` is a search over that grid: one run for each point, one table at the end.
    """
    request = sort_words(words)
    if multirun:
        _sweep(request, as_json)
        return
    from llmrecipe.cli.early_checks import begun, composed, resumed

    run_dir = request.resume
    if request.recipe is None and run_dir is not None and run_dir != AUTO:
        recipe, run_dir = resumed(run_dir)
    else:
        recipe = need_recipe(request, "train")
    composition = composed(recipe, request.overrides)
    if composition.recipe.stages:
        from llmrecipe.cli.pipeline import run_pipeline

        run_pipeline(composition, recipe, as_json)
        return
    if run_dir == AUTO:
        # Every process looks before it joins the others, and none writes before all have joined: they find the same.
        state = begun(composition)
        if state == "done":
            _done(Path(composition.recipe.run.dir or ""), as_json, again=True)
            return
        run_dir = composition.recipe.run.dir if state == "begun" else None
    for note in composition.notes:
        say_progress(note)
    with without_collections():
        from llmrecipe.training.train import train

    run = train(composition, run_dir)
    if run.runtime.is_main:
        _done(run.dir.path, as_json)


def _done(run: Path, as_json: bool, again: bool = False) -> None:
    """Say where a finished run is, or print its newest numbers.

    Args:
        again: it was finished before, which has been said.
    """
    if as_json:
        from llmrecipe.runs.run_record import read_run

        print_json({"run": str(run), **read_run(run).facts()})
    elif not again:
        say(f"done: {run}")


def _sweep(request: VerbWords, as_json: bool) -> None:
    """Search the grid of the values that overrides list; the same command continues it.

    Raises:
        RecipeError: no override lists several values, or `resume=` is given.
    """
    import hashlib
    import json

    from llmrecipe.cli.search import run_search
    from llmrecipe.core.errors import RecipeError
    from llmrecipe.recipe.compose import compose
    from llmrecipe.recipe.overrides import as_word, split_sweeps

    recipe = need_recipe(request, "train -m")
    if request.resume is not None:
        raise RecipeError("train -m: repeat the same command to continue a sweep; its finished runs are kept")
    if "," in recipe:
        raise RecipeError(f"train -m: recipe={recipe}: a sweep is over values of one recipe; give each recipe a command")
    plain, axes = split_sweeps(request.overrides)
    if not axes:
        raise RecipeError(
            "train -m: no word lists several values; write them with commas, as in optim.lr=1e-3,1e-4. One run needs no -m; "
            "the space that a recipe names under `search` is searched by `llmrecipe search`"
        )
    words = ["search=null", as_word(("search",), {"space": axes, "sampler": "grid"}), *plain]
    composition = compose(recipe, words)
    if composition.recipe.run.dir is None:
        # Each sweep has a folder of its own, so that another one over the same recipe is none of its trials.
        run, text = composition.recipe.run, json.dumps([axes, plain])
        key = hashlib.sha256(text.encode()).hexdigest()[:8]
        words.append(as_word(("run", "dir"), f"{run.root}/{run.name or composition.name}-sweep-{key}"))
    run_search(recipe, words, as_json)
