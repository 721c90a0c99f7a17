"""Code shared by verbs: the free arguments after a verb, JSON output, and completion."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from llmrecipe.cli.completion import complete_override
from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.core.path_hints import near_path
from llmrecipe.core.printable import message_text
from llmrecipe.core.verbosity import JSON, QUIET, VERBOSE, is_quiet, is_verbose, show_log

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[recipe=NAME] [key=value ...]",
        help="recipe=NAME or recipe=FILE, and overrides such as optim.lr=1e-4 stack=\\[nf4,lora] ~stack.lora",
        autocompletion=complete_override,
        show_default=False,
    ),
]
StepWords = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value ...]",
        help="Options of the step, seed=N, and where the result goes: run.dir=FOLDER (default: runs/KIND/KEY)",
        show_default=False,
    ),
]


def _use_config_dir(context: typer.Context, folder: Path | None) -> Path | None:
    """Put a folder before the search path, for this command and the processes it starts."""
    if folder is None:
        return None
    from llmrecipe.recipe.recipe_paths import CONFIG_DIR

    if not folder.is_dir():
        raise RecipeError(f"--config-dir {folder}: there is no such folder{near_path(folder)}")
    before = os.environ.get(CONFIG_DIR)
    os.environ[CONFIG_DIR] = str(folder.resolve())

    def restore() -> None:
        os.environ.pop(CONFIG_DIR, None)
        os.environ.update({} if before is None else {CONFIG_DIR: before})

    context.call_on_close(restore)
    return folder


ConfigDir = Annotated[
    Path | None,
    typer.Option(
        "--config-dir",
        metavar="FOLDER",
        callback=_use_config_dir,
        is_eager=True,
        help="Recipes and presets of this folder come before ./recipes.",
        show_default=False,
    ),
]
"""Acts as soon as it is read, so no verb has to look at it."""


def _set_variable(name: str) -> Callable[[bool], bool]:
    """Return the callback of a flag that sets an environment variable for this command and the processes it starts."""

    def set_it(given: bool) -> bool:
        if given:
            os.environ[name] = "1"
            if is_quiet() and is_verbose():
                raise RecipeError("--quiet and --verbose: one leaves out what the other adds; give one of them")
            if name == VERBOSE:
                show_log()
        return given

    return set_it


Json = Annotated[
    bool, typer.Option("--json", help="Print facts as JSON; progress goes to stderr.", callback=_set_variable(JSON))
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        is_eager=True,
        callback=_set_variable(QUIET),
        help="Results, warnings and errors; no progress, no notes.",
    ),
]
"""Acts as soon as it is read, so no verb has to look at it."""
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", is_eager=True, callback=_set_variable(VERBOSE), help="Every step, every metric and the log."
    ),
]
"""Acts as soon as it is read, so no verb has to look at it."""


AUTO = "auto"
"""`resume=auto`: continue the run in `run.dir` where it has begun, else start it."""

PROCESSES = 2
"""Processes that `launch` starts where nothing names a number."""


@dataclass(frozen=True)
class VerbWords:
    """The words of a verb, sorted."""

    recipe: str | None
    resume: str | None
    overrides: list[str]


def sort_words(words: list[str] | None) -> VerbWords:
    """Take `recipe=` and `resume=` out of the words; the rest are overrides.

    Raises:
        RecipeError: one of them is given twice or is empty.
    """
    taken: dict[str, str] = {}
    overrides: list[str] = []
    for word in words or []:
        key, equals, value = word.partition("=")
        if key not in ("recipe", "resume") or not equals:
            overrides.append(word)
            continue
        if key in taken:
            raise RecipeError(f"'{word}': {key}= is given twice ({taken[key]} and {value})")
        if not value:
            raise RecipeError(f"'{word}': {key}= needs a name or a path")
        taken[key] = value
    return VerbWords(taken.get("recipe"), taken.get("resume"), overrides)


def processes_word(overrides: list[str], world: int) -> list[str]:
    """Return the override that sets the number of processes, unless the user gave one."""
    return [] if any(w.startswith("runtime.processes=") for w in overrides) else [f"runtime.processes={world}"]


def runs_and_overrides(words: list[str] | None) -> tuple[list[str], list[str]]:
    """Split words into further runs and overrides, which contain `=` or remove something (`~stack.lora`)."""
    given = list(words or [])
    runs = [word for word in given if "=" not in word and not word.startswith("~")]
    return runs, [word for word in given if word not in runs]


def need_recipe(request: VerbWords, verb: str) -> str:
    """Return the recipe of a request.

    Raises:
        RecipeError: none was given; the message shows how, and what there is.
    """
    if request.recipe is not None:
        return request.recipe
    from llmrecipe.recipe.recipe_paths import LISTED

    near = next(filter(None, (_meant(word, verb) for word in request.overrides)), "")
    raise RecipeError(f"llmrecipe {verb}: no recipe given; write recipe=NAME{near} ({LISTED})")


def _meant(word: str, verb: str) -> str:
    """Return what a word was probably meant to say: a recipe without `recipe=`, or behind a misspelling of it."""
    from llmrecipe.recipe.recipe_paths import all_recipes

    key, equals, value = word.partition("=")
    if equals:
        return f"; did you mean 'recipe={value}'?" if did_you_mean(key, ["recipe"]) else ""
    if _is_recipe(word):
        return f"; did you mean 'llmrecipe {verb} recipe={word}'?"
    return did_you_mean(f"recipe={word}", [f"recipe={name}" for name in all_recipes()])


def _is_recipe(word: str) -> bool:
    """Return whether `recipe=` takes a word: a name, a file or a run."""
    from llmrecipe.recipe.recipe_paths import find_recipe

    try:
        return find_recipe(word).suffix in (".yaml", ".yml")
    except RecipeError:
        return False


def tell(notes: Iterable[str]) -> None:
    """Print notes on how the input was read, on stderr so that they never mix with output; none under `--quiet`."""
    for note in () if is_quiet() else notes:
        print(message_text(f"note: {note}"), file=sys.stderr)
