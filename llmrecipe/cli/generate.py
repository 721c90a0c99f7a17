"""`llmrecipe generate`."""

from __future__ import annotations

from llmrecipe.cli.words import StepWords

PANEL = "Use"
ORDER = 3


def verb(words: StepWords = None) -> None:
    """Answer the prompts of a file with a model; leaves a folder of rows. `llmrecipe show generate` lists the options."""
    from llmrecipe.recipe.steps import compose_step

    # Mistakes in the options come first, before anything heavy is imported.
    compose_step("generate", list(words or []))
    from llmrecipe.steps.run import step_cli

    step_cli("generate", words)
