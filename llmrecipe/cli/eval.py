"""`llmrecipe eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmrecipe.cli.arguments import Json, Quiet, Verbose, Words, runs_and_overrides
from llmrecipe.cli.completion import complete_run
from llmrecipe.core.console import console, print_json
from llmrecipe.core.path_hints import near_path

PANEL = "Use"
ORDER = 1

SPLITS = ("train", "validation", "test")


def verb(
    path: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            autocompletion=complete_run,
            help="A run directory, a folder of runs, a model folder, a hub name or `tiny`; several runs are compared.",
        ),
    ],
    words: Words = None,
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "validation",
    by: Annotated[
        str | None, typer.Option("--by", metavar="COLUMN", help="Several runs: score each row by the run this column names.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="NAME,...", help="Score these tasks of lm-evaluation-harness instead.")
    ] = None,
    shots: Annotated[int | None, typer.Option("--shots", min=0, help="With --tasks: examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="With --tasks: documents of each task.")] = None,
    include: Annotated[
        Path | None, typer.Option("--include", metavar="FOLDER", help="With --tasks: a folder of your own tasks (YAML).")
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option("--groups", metavar="COLUMN", help="Also score the rows of each value of this column, and their gap."),
    ] = None,
    stereotypes: Annotated[
        str | None,
        typer.Option(
            "--stereotypes",
            metavar="FILE",
            help="Score pairs of sentences in the form of CrowS-Pairs instead; `builtin` is a tiny set.",
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Score a run or a model on any split, or on other data (data.path=..., 'eval.metrics=[exact_match]').

    Several runs (eval RUN_A RUN_B) put their adapters on one base in memory and give a table.
    """
    from llmrecipe.core.errors import UserError

    more, overrides = runs_and_overrides(words)
    paths = [path, *more]
    rows: list[dict[str, Any]] | dict[str, Any]
    if stereotypes is not None:
        if more or tasks is not None or by is not None or groups is not None or split != "validation":
            raise UserError("--stereotypes: scores the pairs of a file with one run or model; leave the other options out")
        rows = score_sentence_pairs(path, overrides, stereotypes)
    elif tasks is not None:
        if by is not None or split != "validation":
            raise UserError("--tasks: the rows and splits are the tasks' own; leave out --split and --by")
        rows = score_harness(paths, overrides, tasks, shots, limit, include)
    else:
        for name, given in (("--shots", shots), ("--limit", limit), ("--include", include)):
            if given is not None:
                raise UserError(f"{name}: belongs to --tasks NAME,...")
        rows = score_split(paths, overrides, split, by, groups)
    if isinstance(rows, list):
        print_json(rows) if as_json else show_scores(rows)
    elif as_json:
        print_json({"path": path, "split": split, "metrics": rows})
    else:
        show_metrics(rows)


def score_sentence_pairs(path: str, overrides: list[str], file: str) -> list[dict[str, Any]]:
    """Score the stereotype pairs of a file, which is read before the model is."""
    from llmrecipe.evaluation.stereotype_pairs import read_pairs, score_stereotypes

    read_pairs(file)
    return score_stereotypes(path, overrides, file)


def score_split(
    paths: list[str], overrides: list[str], split: str, by: str | None, groups: str | None
) -> list[dict[str, Any]] | dict[str, Any]:
    """Score one split: a table over several runs or groups of rows, or the metrics of one run or model.

    Raises:
        UserError: there is no such split, or the options do not go together.
    """
    from llmrecipe.cli.early_checks import subject
    from llmrecipe.core.errors import UserError, did_you_mean
    from llmrecipe.evaluation.evaluate_runs import is_folder_of_runs, score_runs, score_side_by_side

    if split not in SPLITS:
        raise UserError(f"--split: there is no split '{split}'{did_you_mean(split, SPLITS)} (allowed: {', '.join(SPLITS)})")
    path, more = paths[0], paths[1:]
    if groups is not None and (more or is_folder_of_runs(path)):
        raise UserError("--groups: the rows of one run or model are scored by group; name one")
    if more:
        from llmrecipe.evaluation.open_several import SCORED, share

        shared = share(paths, overrides, SCORED)
        for one in paths[:1] if by else paths:
            subject(one, shared[one], split)
        return score_side_by_side(paths, overrides, split, by)
    if by is not None:
        raise UserError("--by: rows can only be shared out over several runs; name more than one")
    if is_folder_of_runs(path):
        return score_runs(path, overrides, split)
    subject(path, overrides, split)
    if groups is not None:
        from llmrecipe.evaluation.score_groups import check_column, score_by_group

        check_column(path, overrides, split, groups)
        return score_by_group(path, overrides, split, groups)
    from llmrecipe.evaluation.evaluate_model import evaluate_path

    return evaluate_path(path, overrides, split)


def score_harness(
    paths: list[str], overrides: list[str], tasks: str, shots: int | None, limit: int | None, include: Path | None
) -> list[dict[str, Any]]:
    """Score runs, folders of runs or models on tasks of lm-evaluation-harness; one line a run, task and metric."""
    from llmrecipe.cli.early_checks import subject
    from llmrecipe.core.errors import UserError
    from llmrecipe.evaluation.evaluate_runs import finished_runs, is_folder_of_runs
    from llmrecipe.evaluation.harness import check_library, rows_of_scores, score_tasks

    names = [name for name in tasks.split(",") if name]
    if not names:
        raise UserError("--tasks: name at least one task, such as --tasks hellaswag,arc_easy")
    if include is not None and not include.is_dir():
        raise UserError(f"--include: {include} is no folder{near_path(include)}")
    check_library()
    found: list[dict[str, Any]] = []
    for path in paths:
        for one in map(str, finished_runs(Path(path))) if is_folder_of_runs(path) else [path]:
            subject(one, overrides)
            scores = score_tasks(one, overrides, names, shots, limit, include)
            found += [{"run": one, **row} for row in rows_of_scores(scores)]
    return found


def show_metrics(metrics: dict[str, Any]) -> None:
    """Print the metrics of one run or model, each with its interval where it has one."""
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
