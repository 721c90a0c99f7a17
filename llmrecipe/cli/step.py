"""`llmrecipe step`."""

from __future__ import annotations

from typing import Annotated

import typer

from llmrecipe.cli.arguments import ConfigDir, Json, Quiet, StepWords, Verbose
from llmrecipe.core.console import console, number, print_json, say, say_progress

PANEL = "Tools"


def complete_step(incomplete: str) -> list[str]:
    """Return the names of steps."""
    from llmrecipe.core import registry

    return [name for name in registry.names("step") if name.startswith(incomplete)]


def verb(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="See `llmrecipe list step`.", autocompletion=complete_step)],
    words: StepWords = None,
    config_dir: ConfigDir = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Do one step of a pipeline by itself, in the words of its stage."""
    do_step(kind, words, as_json)


def do_step(kind: str, words: list[str] | None, as_json: bool = False) -> None:
    """Do a step, print its metrics, say where the result is."""
    from llmrecipe.recipe.step_spec import compose_step

    # Mistakes in the options come first, before anything heavy is imported.
    composition = compose_step(kind, list(words or []))
    for note in composition.notes:
        say_progress(note)
    from rich.table import Table

    from llmrecipe.pipelines.steps.run_step import run_step
    from llmrecipe.runs.run_dir import read_metrics

    before = (composition.dir / "final" / "metrics.json").is_file()
    folder = run_step(composition)
    if as_json:
        print_json({"folder": str(folder.path), "reused": before, "metrics": read_metrics(folder.path)})
        return
    table = Table("metric", "value", box=None, header_style="bold")
    for name, value in read_metrics(folder.path).items():
        table.add_row(name, number(value))
    console().print(table)
    say(f"{'reused' if before else 'done'}: {folder.path}")
