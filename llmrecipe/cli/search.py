"""`llmrecipe search`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmrecipe.cli.arguments import ConfigDir, Json, Quiet, Verbose, Words, need_recipe, sort_words
from llmrecipe.core.console import console, number, print_json, say
from llmrecipe.core.score_intervals import with_interval

if TYPE_CHECKING:
    from llmrecipe.pipelines.search.study import Search
    from llmrecipe.pipelines.search.trial import Trial

PANEL = "Train"
ORDER = 4
SHOWN = 20
"""Rows of the table; trials.jsonl has all of them."""


def verb(
    words: Words = None, config_dir: ConfigDir = None, quiet: Quiet = False, verbose: Verbose = False, as_json: Json = False
) -> None:
    """Search the space a recipe gives under `search`, and write the best as a plain recipe; the same command resumes it."""
    from llmrecipe.core.errors import RecipeError

    request = sort_words(words)
    if request.resume is not None:
        raise RecipeError("resume=: repeat the same command to resume a search; its finished trials are kept")
    run_search(need_recipe(request, "search"), request.overrides, as_json)


def run_search(recipe: str, words: list[str], as_json: bool = False) -> None:
    """Run or resume the search of a recipe, print one table over its trials and say where the best is."""
    from llmrecipe.recipe.compose import compose

    # Mistakes in the recipe come first, before anything about the machine or the model.
    compose(recipe, words)
    from llmrecipe.pipelines.search.display import importances, picture
    from llmrecipe.pipelines.search.study import search

    found, trials = search(recipe, words)
    best = found.best(trials)
    path, image = found.write_best(best, trials), picture(found, trials)
    if as_json:
        from dataclasses import asdict

        shares = importances(found, trials)
        known = {"interval": found.ends, "final": None if found.final is None else asdict(found.final)}
        listed = [asdict(t) for t in trials]
        print_json({"best": asdict(best), "recipe": str(path), "importance": shares, "trials": listed, **known})
        return
    show_trials(found, trials)
    if found.final is not None:
        from llmrecipe.core.score_intervals import shown

        scores = ", ".join(f"{name} {text}" for name, text in shown(found.final.test, number).items())
        say(f"final: {scores}, by {found.final.dir}, trained on training and validation rows")
    if image is not None:
        say(f"picture: {image}")
    say(f"done: {path}")


def show_trials(search: Search, trials: list[Trial]) -> None:
    """Print the trials, the best first."""
    from rich.table import Table

    from llmrecipe.pipelines.search.display import importances, ranked

    keys, against = list(search.section.space), search.section.against
    front = {trial.number for trial in search.front(trials)} if against else set()
    several = len(search.seeds) > 1
    names = [*keys, search.evaluation.monitor, *(["std"] if several else []), *against]
    shown = Table("trial", *names, "", box=None, header_style="bold")
    best = search.best(trials).number
    for trial in ranked(search, trials)[:SHOWN]:
        cells = [number(trial.point[k]) for k in keys]
        spread = [number(trial.spread)] if several else []
        spent = [number(trial.costs.get(cost)) for cost in against]
        state = trial.state if trial.state != "done" else "front" if trial.number in front else ""
        value = with_interval(trial.value, search.ends if trial.number == best else None, number)
        shown.add_row(str(trial.number), *cells, value, *spread, *spent, state)
    out = console()
    out.print(f"{search.composition.name}: {len(trials)} trials in {search.folder}", soft_wrap=True)
    out.print(shown)
    shares = importances(search, trials)
    if shares:
        named = ", ".join(f"{key} {share:.2f}" for key, share in sorted(shares.items(), key=lambda entry: -entry[1]))
        out.print(f"importance: {named}", soft_wrap=True)
