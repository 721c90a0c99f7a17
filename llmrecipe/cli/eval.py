"""`llmrecipe eval`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmrecipe.cli.arguments import Json, Words, runs_and_overrides
from llmrecipe.core.console import console, print_json

PANEL = "Use"
ORDER = 1


def verb(
    path: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="A run directory, a folder of runs, a model folder, a hub name or `tiny`; several runs are compared.",
        ),
    ],
    words: Words = None,
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "validation",
    by: Annotated[
        str | None, typer.Option("--by", metavar="COLUMN", help="Several runs: score each row by the run this column names.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a run or a model on any split, or on other data (data.path=..., 'eval.metrics=[exact_match]').

    Several runs (eval RUN_A RUN_B) put their adapters on one base in memory and give a table.
    """
    from llmrecipe.core.errors import UserError, did_you_mean

    splits = ("train", "validation", "test")
    if split not in splits:
        raise UserError(f"--split: there is no split '{split}'{did_you_mean(split, splits)} (allowed: {', '.join(splits)})")
    from llmrecipe.cli.early_checks import subject
    from llmrecipe.evaluation.evaluate_runs import is_folder_of_runs, score_runs, score_side_by_side

    more, overrides = runs_and_overrides(words)
    if more:
        from llmrecipe.evaluation.open_several import SCORED, share

        shared = share([path, *more], overrides, SCORED)
        for one in [path] if by else [path, *more]:
            subject(one, shared[one], split)
        scores = score_side_by_side([path, *more], overrides, split, by)
        print_json(scores) if as_json else show_scores(scores)
        return
    if by is not None:
        raise UserError("--by: rows can only be shared out over several runs; name more than one")
    if is_folder_of_runs(path):
        scores = score_runs(path, overrides, split)
        print_json(scores) if as_json else show_scores(scores)
        return
    subject(path, overrides, split)
    from llmrecipe.evaluation.evaluate_model import evaluate_path

    metrics = evaluate_path(path, overrides, split)
    if as_json:
        print_json({"path": path, "split": split, "metrics": metrics})
        return
    from rich.table import Table

    from llmrecipe.core.score_intervals import LEVEL, with_ends

    table = Table("metric", "value", f"{LEVEL:.0%} interval", box=None, header_style="bold")
    for name, (value, ends) in with_ends(metrics).items():
        table.add_row(name, f"{value:.6g}", "" if ends is None else f"{ends[0]:.4g} to {ends[1]:.4g}")
    console().print(table)


def show_scores(rows: list[dict[str, Any]]) -> None:
    """Print scores as a table, one row per run."""
    from rich.table import Table

    from llmrecipe.core.score_intervals import shown

    texts = [shown(row, lambda v: f"{v:.6g}" if isinstance(v, float) else str(v)) for row in rows]
    names = list(dict.fromkeys(k for row in texts for k in row))
    table = Table(*names, box=None, header_style="bold")
    for row in texts:
        table.add_row(*(row.get(n, "") for n in names))
    console().print(table)
