"""Code shared by verbs: the free arguments after a verb, JSON output, and completion."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.core.printable import message_text


def complete_word(incomplete: str) -> list[str]:
    """Return the completions of a word: recipe names after `recipe=`, choices after a group, key paths otherwise."""
    from llmrecipe.core import registry
    from llmrecipe.recipe.compose import section_defaults
    from llmrecipe.recipe.recipe_paths import GROUPS, all_recipes, presets

    key, equals, _ = incomplete.partition("=")
    if key == "recipe":
        return [f"recipe={name}" for name in all_recipes() if f"recipe={name}".startswith(incomplete)]
    if equals and key in GROUPS:
        names = sorted({*presets(key), *registry.names(key)})
        return [f"{key}={name}" for name in names if f"{key}={name}".startswith(incomplete)]
    paths = ["recipe=", "resume=", *(f"{group}=" for group in GROUPS)]
    for section, value in section_defaults().items():
        paths += [f"{section}.{name}=" for name in value] if isinstance(value, dict) and value else [f"{section}="]
    return [path for path in dict.fromkeys(paths) if path.startswith(incomplete)]


Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[recipe=NAME] [key=value ...]",
        help="recipe=NAME or recipe=FILE, and overrides such as optim.lr=1e-4 stack=\\[nf4,lora] ~stack.lora",
        autocompletion=complete_word,
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
        raise RecipeError(f"--config-dir {folder}: there is no such folder")
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
Json = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]


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
    from llmrecipe.recipe.recipe_paths import all_recipes

    known = list(all_recipes())
    bare = next((w for w in request.overrides if "=" not in w), None)
    near = (
        f"; did you mean 'llmrecipe {verb} recipe={bare}'?"
        if bare in known
        else did_you_mean(f"recipe={bare}", [f"recipe={k}" for k in known])
    )
    raise RecipeError(f"llmrecipe {verb}: no recipe given; write recipe=NAME{near if bare else ''} (known: {', '.join(known)})")


def tell(notes: Iterable[str]) -> None:
    """Print notes on how the input was read, on stderr so that they never mix with output."""
    for note in notes:
        print(message_text(f"note: {note}"), file=sys.stderr)
