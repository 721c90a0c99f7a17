"""`llmrecipe verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmrecipe.cli.arguments import ConfigDir, Json, Quiet, Verbose, Words, runs_and_overrides, tell
from llmrecipe.cli.completion import complete_run
from llmrecipe.core.console import print_json, say_progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmrecipe.evaluation.verify.verify_subject import CheckResult

PANEL = "Train"
ORDER = 3


def verb(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_RUN_OR_EXPORT",
            autocompletion=complete_run,
            help="A recipe (name, file or recipe=NAME), a run directory, or a folder that `export` wrote.",
        ),
    ],
    words: Words = None,
    run: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="Run of an exported folder; default: the folder above it.")
    ] = None,
    config_dir: ConfigDir = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Prove a recipe, a run or an export: layouts, stock forward, files, merging, generation, template, resume.

    Trains four steps in a temporary folder; of a pipeline, every stage. Exit code 3 where a comparison fails.
    What it found of a run is kept in RUN/verify.json, and the run's report shows it.
    """
    from llmrecipe.core.errors import RecipeError

    more, overrides = runs_and_overrides(words)
    if more:
        raise RecipeError(f"llmrecipe verify: one subject at a time; '{more[0]}' is another")

    lines = []
    for line in check_results(subject.removeprefix("recipe="), overrides, run):
        lines.append(line)
        if not as_json:
            say_progress(f"{line.check}: {line.result}")
    if not overrides and (Path(subject) / "status.json").is_file():
        keep(Path(subject), lines)
    failed = [line for line in lines if line.result == "failed"]
    if as_json:
        print_json({"subject": subject, "passed": not failed, "lines": [line.facts() for line in lines]})
    else:
        show_lines(lines)
    if failed:
        raise typer.Exit(3)


def keep(run: Path, lines: list[CheckResult]) -> None:
    """Write what was found into the run's folder, where it may be written."""
    from llmrecipe.core.errors import RunError
    from llmrecipe.runs.verified import keep_verified

    try:
        keep_verified(run, [line.facts() for line in lines])
    except RunError as error:
        tell([str(error)])


def check_results(subject: str, overrides: list[str], run: str | None) -> Iterator[CheckResult]:
    """Return the lines of a recipe, of the stages of a pipeline, of a run or of an exported folder."""
    from llmrecipe.evaluation.verify.exported import is_export
    from llmrecipe.evaluation.verify.verify_subject import verify_subject
    from llmrecipe.models.checkpoint_path import run_folder
    from llmrecipe.recipe.compose import compose

    if not is_export(subject) and run_folder(subject) is None:
        composition = compose(subject, overrides)
        if composition.recipe.stages:
            from llmrecipe.pipelines.verify_stages import verify_stages

            return verify_stages(composition)
    return verify_subject(subject, overrides, run)


def show_lines(lines: list[CheckResult]) -> None:
    """Print what was compared, the largest difference and its bound, one row per verification."""
    from rich.table import Table
    from rich.text import Text

    from llmrecipe.core.console import console, number

    table = Table("check", "result", "difference", "bound", "compared", box=None, header_style="bold")
    for line in lines:
        colour = {"ok": "green", "failed": "red"}.get(line.result, "yellow")
        text = line.compared.rstrip(".") + (f": {line.reason}" if line.reason else "")
        result = Text(line.result, style=colour)
        table.add_row(Text(line.check), result, number(line.difference), number(line.bound), Text(text))
    console().print(table)
