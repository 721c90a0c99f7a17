"""`llmrecipe generate`."""

from __future__ import annotations

from llmrecipe.cli.arguments import Json, Quiet, StepWords, Verbose
from llmrecipe.cli.step import do_step

PANEL = "Use"
ORDER = 3


def verb(words: StepWords = None, quiet: Quiet = False, verbose: Verbose = False, as_json: Json = False) -> None:
    """Answer the prompts of a file with a model; leaves a folder of rows. `llmrecipe show generate` lists the options."""
    do_step("generate", words, as_json)
