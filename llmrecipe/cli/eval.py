"""`llmrecipe eval`."""

from __future__ import annotations

from typing import Annotated

import typer

from llmrecipe.cli.words import Json, Words, print_json

PANEL = "Use"
ORDER = 1


def verb(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run directory, a model folder, a hub name or `tiny`.")],
    words: Words = None,
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "validation",
    as_json: Json = False,
) -> None:
    """Score a run or a model on any split, or on other data (data.path=..., 'eval.metrics=[exact_match]')."""
    from llmrecipe.errors import UserError, did_you_mean

    splits = ("train", "validation", "test")
    if split not in splits:
        raise UserError(f"--split: there is no split '{split}'{did_you_mean(split, splits)} (allowed: {', '.join(splits)})")
    from llmrecipe.evaluation.many import is_folder_of_runs, score_runs, show_scores

    if is_folder_of_runs(path):
        scores = score_runs(path, list(words or []), split)
        print_json(scores) if as_json else show_scores(scores)
        return
    from llmrecipe.cli.preflight import subject

    subject(path, list(words or []), split)
    from llmrecipe.evaluation.standalone import evaluate_path

    metrics = evaluate_path(path, list(words or []), split)
    if as_json:
        print_json({"path": path, "split": split, "metrics": metrics})
        return
    from rich.table import Table

    from llmrecipe.cli.show_table import console

    table = Table("metric", "value", box=None, header_style="bold")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.6g}")
    console().print(table)
