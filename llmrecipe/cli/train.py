"""`llmrecipe train`."""

from __future__ import annotations

from llmrecipe.cli.arguments import AUTO, Words, need_recipe, sort_words

PANEL = "Train"
ORDER = 1


def verb(words: Words = None) -> None:
    """Run a recipe, or all stages of a pipeline recipe.

    `resume=RUN_DIR` continues a run; with `resume=auto` the same command starts the run in `run.dir` and continues it.
    """
    request = sort_words(words)
    from llmrecipe.cli.early_checks import begun, composed, resumed

    run_dir = request.resume
    if request.recipe is None and run_dir is not None and run_dir != AUTO:
        recipe, run_dir = resumed(run_dir)
    else:
        recipe = need_recipe(request, "train")
    composition = composed(recipe, request.overrides)
    if composition.recipe.stages:
        from llmrecipe.cli.pipeline import run_pipeline

        run_pipeline(composition, recipe)
        return
    if run_dir == AUTO:
        # Every process looks before it joins the others, and none writes before all have joined: they find the same.
        state = begun(composition)
        if state == "done":
            return
        run_dir = composition.recipe.run.dir if state == "begun" else None
    for note in composition.notes:
        print(note)
    from llmrecipe.training.train import train

    run = train(composition, run_dir)
    if run.runtime.is_main:
        print(f"done: {run.dir.path}")
