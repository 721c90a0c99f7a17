"""What is known of the best trial besides its score: the interval of the score, and its last training with `final`.

The interval is that of the rows: those of the validation split are drawn again as in `training.intervals`. It does not say how
much better the best of many trials looks by chance; the test split, which no trial has seen, does.

The last training reads training and validation rows (`data.train_on`). Nothing is left to stop it, so it takes as long as the
trial took to its best evaluation: of T steps with the best after t, a recipe with `steps` takes t, one with `epochs` the
share t / T of its passes, which are longer now. It is an ordinary run, `final-<key>/`, whose test split is scored once.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrecipe.core.apart import apart
from llmrecipe.core.console import say_aside, say_progress
from llmrecipe.core.errors import RecipeError, RunError, UserError
from llmrecipe.core.foreign import read_json, reading
from llmrecipe.core.score_intervals import Ends
from llmrecipe.core.signals import handled_by
from llmrecipe.data.formats.splits import has_split, open_split
from llmrecipe.pipelines.run_stages import run_stage
from llmrecipe.recipe.overrides import as_word
from llmrecipe.recipe.rights import rights_of
from llmrecipe.runs.durable import write_text
from llmrecipe.runs.run_dir import read_metrics

if TYPE_CHECKING:
    from llmrecipe.pipelines.run_stages import Pipeline
    from llmrecipe.pipelines.search.trial import Trial
    from llmrecipe.recipe.data_section import DataSection
    from llmrecipe.recipe.pipeline_plan import Planned
    from llmrecipe.recipe.schema import EvalSection, ModelSection, Recipe

FINAL_WORDS = (
    "search=null",
    "data.train_on=train+validation",
    "eval.test=true",
    "eval.monitor=eval/loss",
    "eval.patience=null",
    "eval.forgetting_curve=false",
    "eval.forgetting_limit=null",
)
"""Overrides of the last training: all rows but the test split's, and nothing that an evaluation would decide."""
INTERVAL = "interval.json"
"""File of a search with the interval of its best trial."""


@dataclass(frozen=True)
class Final:
    """The last training of a search."""

    dir: str
    test: dict[str, Any]
    """Its metrics of the test split, with the ends of their intervals."""
    looks: int
    """How many last trainings of this search have scored the test split, this one included."""


def check_final(data: DataSection, joined: DataSection) -> None:
    """Refuse a last training that could not be run, before the first trial.

    Args:
        data: of the trials.
        joined: of the last training.

    Raises:
        RecipeError: there is no test split.
        DataError: training and validation rows cannot be joined.
    """
    if not has_split(data, "test"):
        raise RecipeError("search.final: there is no test split to score; set data.test=FILE or a share such as data.test=0.1")
    open_split(joined, "train")


def run_final(pipeline: Pipeline, planned: Planned, folder: Path) -> Final:
    """Run, continue or reuse the last training of a search.

    Args:
        folder: of the search.

    Raises:
        Interrupted: a signal arrived; the same command goes on.
        RunError: it could not be run to its end.
    """
    say_progress(f"final: the best point on training and validation rows, in {planned.dir}")
    with handled_by(pipeline.children.forward):
        run_stage(pipeline, planned)
    test = {name: value for name, value in read_metrics(planned.dir).items() if name.startswith("test/")}
    looks = sum(any(name.startswith("test/") for name in read_metrics(run)) for run in folder.glob("final-*"))
    if looks > 1:
        say_aside(f"{looks} winners of this search were scored on its test split: a choice by those scores fits its rows too")
    return Final(str(planned.dir), test, looks)


def final_length(best: Trial, recipe: Recipe) -> tuple[str, ...]:
    """Return the override that makes the last training as long as the runs of a trial were at their best evaluation.

    Args:
        recipe: of the trial.

    Raises:
        RunError: they were best before their first step.
    """
    shares = []
    for run in map(Path, best.dirs):
        report = run / "report.json"
        found = read_json(report)
        with reading(str(report), "train the trial again"):
            shares.append(float(read_metrics(run)["best_step"]) / float(found["steps"]))
    share = statistics.fmean(shares)
    if share == 0.0:
        raise RunError("search.final: the best trial is best before its first step, so that training longer only harms")
    if share == 1.0:
        return ()
    if recipe.steps is not None:
        return (as_word(("steps",), max(1, round(share * recipe.steps))),)
    return (as_word(("epochs",), float(f"{share * (recipe.epochs or 1.0):.6g}")),)


def row_interval(folder: Path, evaluation: EvalSection, model: ModelSection, best: Trial) -> Ends | None:
    """Return the ends of the interval of the best trial's score over the validation rows; it is kept for the next start.

    None where several seeds give a standard deviation instead, where `eval.bootstrap` is 0, where the score is not one of
    rows that are read one at a time, and, with a message, where the run it left cannot be scored again.

    Args:
        folder: of the search.
        evaluation: of its recipe.
        model: of its recipe, with the rights that the user gave.
    """
    monitor, bootstrap = evaluation.monitor, evaluation.bootstrap
    run = Path(best.dirs[0]) if best.dirs else None
    if len(best.values) != 1 or not bootstrap or not monitor.startswith("eval/") or run is None or not (run / "final").is_dir():
        return None
    wanted = {"run": run.name, "monitor": monitor, "bootstrap": bootstrap}
    kept = folder / INTERVAL
    if kept.is_file():
        found = read_json(kept, "delete it, and it is computed again")
        with reading(str(kept), "delete it, and it is computed again"):
            if {key: found[key] for key in wanted} == wanted:
                return None if found["ends"] is None else (float(found["ends"][0]), float(found["ends"][1]))
    rights = [as_word(("model", name), True) for name in rights_of(model)]
    try:
        ends = apart(lambda: _ends(str(run), rights, monitor.removeprefix("eval/")), "search: the interval of its best trial")
    except UserError as error:
        say_aside(f"the interval of {monitor} is not known: {error}")
        return None
    write_text(kept, json.dumps({**wanted, "ends": ends}) + "\n")
    return ends


def _ends(run: str, words: list[str], metric: str) -> Ends | None:
    """Score the validation split with the run of a trial; return the ends of one metric's interval."""
    from llmrecipe.evaluation.evaluate_model import evaluate_path

    metrics = evaluate_path(run, words)
    low, high = metrics.get(f"{metric}/low"), metrics.get(f"{metric}/high")
    return None if low is None or high is None else (low, high)
