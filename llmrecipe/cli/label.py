"""`llmrecipe label`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmrecipe.cli.arguments import Json, Quiet, Verbose
from llmrecipe.core.console import print_json, say

if TYPE_CHECKING:
    from rich.console import Console

    from llmrecipe.evaluation.human_labels import Labels, Question

PANEL = "Use"
ORDER = 4
KEYS = {"1": "1", "2": "2", "t": "tie", "s": "skip", "u": "undo", "q": "quit"}


def verb(
    source: Annotated[
        str, typer.Argument(metavar="ROWS_OR_MODEL", help="Rows with two answers to a prompt; with --prompts, a model to ask.")
    ],
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="Prompts for the model: a file, folder or builtin:NAME.")
    ] = None,
    labeller: Annotated[str | None, typer.Option("--labeller", "-l", help="Whose labels; default: the user's name.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the labels.")] = Path("labels"),
    by: Annotated[
        str | None, typer.Option("--by", help="Let a judge label: rule, or {kind: local, path: RUN}, {kind: http, ...}.")
    ] = None,
    constitution: Annotated[str, typer.Option("--constitution", help="The judge's principles.")] = "assistant",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Maximum number of rows or prompts, from the first.")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0.01, help="Of the model's answers.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 128,
    seed: Annotated[int, typer.Option("--seed", help="Of the answers, and of which one is shown first.")] = 0,
    words: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="KEY=VALUE", help="Override for the model's recipe (model.dtype=...); may be repeated."),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Choose the better of two answers, key by key; writes preference rows, resumes where it stopped."""
    from llmrecipe.data.formats.answered_prompts import read_answered
    from llmrecipe.evaluation import human_labels

    rows = (
        source if prompts is None else answers_of(source, prompts, out, limit, temperature, max_new_tokens, seed, words or [])
    )
    requested = human_labels.questions(read_answered(rows, "train", 2, limit, "ROWS_OR_MODEL"))
    judge = None if by is None else judge_of(by, constitution)
    name = labeller or (judge[0].identity.replace("/", "_") if judge is not None else user_name())
    labels = human_labels.Labels(out, name, seed)
    try:
        if judge is not None:
            human_labels.label_by_judge(labels, requested, *judge, batch=32)
        else:
            label_pairs(labels, requested, screen(as_json))
    finally:
        written = labels.write(requested)
        labels.close()
    facts = human_labels.facts(out, requested)
    if as_json:
        print_json({**facts, "rows": written, "file": str(out / f"{name}.jsonl")})
        return
    print_agreement(facts)
    say(f"{written} preference rows: {out / f'{name}.jsonl'}")


def answers_of(
    model: str,
    prompts: str,
    out: Path,
    limit: int | None,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    overrides: list[str],
) -> str:
    """Return the folder with two answers of the model to each prompt, generating it once."""
    from llmrecipe.pipelines.steps.run_step import run_step
    from llmrecipe.recipe.overrides import as_word
    from llmrecipe.recipe.step_spec import compose_step

    options: dict[str, Any] = {"model": model, "prompts": prompts, "n": 2, "temperature": temperature, "seed": seed}
    options |= {"max_new_tokens": max_new_tokens, **({"limit": limit} if limit else {})}
    options |= {"words": overrides} if overrides else {}
    words = [as_word((key,), value) for key, value in options.items()]
    words += [as_word(("run", "dir"), str(out / "answers")), 'log.live="off"']
    kept, sys.stdout = sys.stdout, sys.stderr
    try:
        return str(run_step(compose_step("generate", words)).path)
    finally:
        sys.stdout = kept


def judge_of(by: str, constitution: str) -> tuple[Any, Any, Any]:
    """(judge, constitution, principles) of the words.

    Raises:
        RecipeError: one of them cannot work.
    """
    from llmrecipe.core.errors import RecipeError
    from llmrecipe.feedback.judges.constitution import read_constitution
    from llmrecipe.feedback.judges.labeller import build_judge
    from llmrecipe.recipe.overrides import parse_overrides

    judge = build_judge(parse_overrides([f"by={by}"])[0].value, "--by")
    judge.check("--by")
    if judge.shares:
        raise RecipeError("--by.path: must be given: a model path, a hub name or a run directory")
    judge.open()
    made = read_constitution(constitution, "--constitution")
    return judge, made, made.choose([], ["comparison"], "--constitution")


def user_name() -> str:
    """Return the user's name, or `me` where the system has none."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "me"


# --- the screen -------------------------------------------------------------------------------------------------------


def screen(as_json: bool) -> Console:
    """Return the console for questions: stderr where the facts go to stdout as JSON."""
    from llmrecipe.core.console import console

    return console(stderr=as_json)


def label_pairs(labels: Labels, requested: list[Question], out: Console) -> None:
    """Show the pending pairs one after the other until the end of the input."""
    out.print("1 or 2: the better one; t: tie; s: skip; u: undo; q: quit", style="dim")
    while True:
        pending = labels.pending(requested)
        if not pending:
            out.print("every pair is labelled; u takes the last label back, any other key leaves")
            if read_key(out) != "undo" or labels.undo() is None:
                return
            continue
        question = pending[0]
        swapped = labels.swapped(question)
        show_pair(out, question, swapped, len(requested) - len(pending) + 1, len(requested))
        said = read_key(out)
        if said == "quit":
            return
        if said == "undo":
            if labels.undo() is None:
                out.print("nothing to undo")
            continue
        choice = said if said in ("tie", "skip") else "first" if (said == "1") != swapped else "second"
        labels.decide(question, choice, swapped=swapped)


def show_pair(out: Console, question: Question, swapped: bool, number: int, total: int) -> None:
    """Show a prompt and its two answers side by side."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from llmrecipe.core.printable import printable

    sides = (question.second, question.first) if swapped else (question.first, question.second)
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(*(Panel(Text(printable(text)), title=str(i), title_align="left") for i, text in enumerate(sides, 1)))
    out.print(Text(f"[{number}/{total}] {printable(question.row.words)}", "bold"))
    out.print(grid)


def read_key(out: Console) -> str:
    """Read the choice: a key on a terminal, a line or word from a pipe; `quit` at its end."""
    while True:
        if sys.stdin.isatty():
            import click

            word = click.getchar().strip().lower()
            if word in ("\x03", "\x04"):
                return "quit"
        else:
            line = sys.stdin.readline()
            if not line:
                return "quit"
            word = line.strip().lower()
        for key, meaning in KEYS.items():
            if word and word in (key, meaning):
                return meaning
        if word:
            out.print(f"{word!r} is no key here: 1, 2, t (tie), s (skip), u (undo), q (quit)")


def print_agreement(facts: dict[str, Any]) -> None:
    """Print how much each labeller labelled, and how far they agree."""
    from rich.table import Table

    from llmrecipe.core.console import console, number

    out = console()
    people = Table("labeller", "labelled", "first", "second", "tie", "skip", "chose the one shown first", box=None)
    for name, counts in facts["labellers"].items():
        people.add_row(name, *(number(v) if v is not None else "-" for v in counts.values()))
    out.print(f"{facts['pairs']} pairs")
    out.print(people)
    if facts["agreement"]:
        table = Table("one", "other", "both judged", "agree", "kappa", box=None)
        for pair in facts["agreement"]:
            kappa = "undefined" if pair["kappa"] is None else number(pair["kappa"])
            table.add_row(pair["one"], pair["other"], str(pair["items"]), number(pair["share"]), kappa)
        out.print(table)
