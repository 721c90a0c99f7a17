"""`llmrecipe step`."""

from __future__ import annotations

from typing import Annotated

import typer

from llmrecipe.cli.words import StepWords

PANEL = "Tools"


def complete(incomplete: str) -> list[str]:
    """Names of steps."""
    from llmrecipe import registry

    return [name for name in registry.names("step") if name.startswith(incomplete)]


def verb(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="See `llmrecipe list step`.", autocompletion=complete)],
    words: StepWords = None,
) -> None:
    """Do one step of a pipeline by itself, in the words of its stage."""
    from llmrecipe.recipe.steps import compose_step

    # Mistakes in the options come first, before anything heavy is imported.
    compose_step(kind, list(words or []))
    from llmrecipe.steps.run import step_cli

    step_cli(kind, words)
