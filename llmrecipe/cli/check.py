"""`llmrecipe check`."""

from __future__ import annotations

from dataclasses import asdict

from llmrecipe.cli.arguments import ConfigDir, Json, Quiet, Verbose, Words, need_recipe, sort_words, tell
from llmrecipe.cli.findings import show_findings
from llmrecipe.core.console import print_json
from llmrecipe.core.lazy import without_collections

PANEL = "Train"
ORDER = 2


def verb(
    words: Words = None, config_dir: ConfigDir = None, quiet: Quiet = False, verbose: Verbose = False, as_json: Json = False
) -> None:
    """Validate a recipe and build it without weights: stack order, trained tensors, memory, data."""
    request = sort_words(words)
    recipe = need_recipe(request, "check")
    from llmrecipe.cli.early_checks import composed

    # Mistakes in the recipe come first, before anything about the machine or the model.
    composition = composed(recipe, request.overrides)
    if composition.recipe.stages:
        from llmrecipe.cli.pipeline import check_pipeline

        check_pipeline(composition, as_json)
        return
    tell(composition.notes)
    with without_collections():
        from llmrecipe.training.dry_run import examine

    found = examine(composition)
    print_json(asdict(found)) if as_json else show_findings(found)
