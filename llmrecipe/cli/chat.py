"""`llmrecipe chat`."""

from __future__ import annotations

from typing import Annotated

import typer

from llmrecipe.cli.arguments import Json, Words, runs_and_overrides
from llmrecipe.cli.completion import complete_run
from llmrecipe.core.console import print_json, say
from llmrecipe.core.errors import UserError
from llmrecipe.core.printable import printable

PANEL = "Use"
ORDER = 2


def verb(
    path: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            autocompletion=complete_run,
            help="A run directory, a model folder, a hub name or `tiny`; several runs of one base can be switched between.",
        ),
    ],
    words: Words = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Answer this and stop; may be repeated.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Text before which an answer ends; may be repeated.")
    ] = None,
    use: Annotated[
        list[str] | None,
        typer.Option("--use", metavar="NAME", help="Answer with this run (or task); may be repeated. Default: with all."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Talk to a run or a model; with --prompt, answer and stop.

    Several runs (chat RUN_A RUN_B) put their adapters on one base in memory; `/use NAME` switches. Overrides go to all of them.
    """
    from llmrecipe.cli.early_checks import answerers

    more, overrides = runs_and_overrides(words)
    if "" in (stop or []):
        raise UserError("--stop: an empty text would end every answer before it begins; name a text")
    answerers([path, *more], overrides)
    from llmrecipe.engine.sampling import Sampling
    from llmrecipe.evaluation.chat import Chat

    sampling = Sampling(max_new_tokens, temperature, top_p, seed=seed if temperature else None, stop=tuple(stop or ()))
    chat = Chat.open([path, *more], overrides, sampling, system)
    chat.use(use or [])
    if prompt:
        answers = chat.answers(prompt)
        if as_json:
            print_json(answers)
            return
        for pair in answers:
            answer = printable(pair["answer"])
            say(f"[{pair['adapter']}] {answer}" if len(chat.used) > 1 else answer)
        return
    from llmrecipe.cli.conversation import converse

    converse(chat)
