"""Tasks of lm-evaluation-harness on a run or a model, through the harness's own Python API.

The model is opened as `eval` opens it, with every adapter of the run mounted, and given to the harness's Transformers backend:
prompts, few-shot examples, scoring and metrics are the harness's. What a run scored is kept in its folder.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmrecipe.core.errors import UserError, did_you_mean
from llmrecipe.core.lazy import is_installed, load_module
from llmrecipe.evaluation.evaluate_model import Subject, open_subject
from llmrecipe.models.checkpoint_path import run_folder
from llmrecipe.runs.durable import write_text
from llmrecipe.runs.run_record import TASK_SCORES, read_task_scores

LIBRARY = "lm_eval"
HEAD = "causal"


def check_library() -> None:
    """Refuse to go on without the harness.

    Raises:
        UserError: with the command that installs it.
    """
    if not is_installed(LIBRARY):
        raise UserError("--tasks: needs lm-evaluation-harness, which is not installed: pip install 'llmrecipe[eval]'")


def score_tasks(
    path: str,
    overrides: list[str],
    tasks: Sequence[str],
    shots: int | None = None,
    limit: int | None = None,
    include: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Score a run or a model on tasks of the harness, and write the scores of a run into its folder.

    Args:
        tasks: names of tasks or groups.
        shots: examples before each question; None leaves it to the task.
        limit: documents of each task; None takes all.
        include: folder of further tasks (YAML).

    Returns:
        task -> `metrics` (name -> value), `errors` (name -> standard error), `shots`, `limit`, `rows`, `version` of the
        task and `library`, the version of the harness.

    Raises:
        UserError: the harness is not installed, a task is unknown, or the model predicts no next token.
    """
    check_library()
    manager = load_module("lm_eval.tasks").TaskManager(include_path=None if include is None else str(include))
    known = list(manager.all_tasks)
    for name in tasks:
        if name not in known:
            raise UserError(
                f"--tasks: the harness has no task '{name}'{did_you_mean(name, known)}; `lm-eval ls tasks` lists all "
                f"{len(known)}, --include FOLDER adds your own"
            )
    subject = open_subject(path, overrides)
    if subject.loaded.head != HEAD:
        raise UserError(f"--tasks: {path} has a head of kind {subject.loaded.head}; the harness scores causal models")
    found = _evaluated(subject, list(tasks), shots, limit, manager)
    folder = run_folder(path)
    if folder is not None:
        write_task_scores(Path(path) if (Path(path) / "status.json").is_file() else folder.parent, found)
    return found


def _evaluated(subject: Subject, tasks: list[str], shots: int | None, limit: int | None, manager: object) -> dict[str, Any]:
    """Run the harness on a loaded model."""
    batch = subject.composition.recipe.batch.size
    loaded = subject.loaded
    logging.getLogger(LIBRARY).setLevel(logging.WARNING)
    backend = load_module("lm_eval.models.huggingface").HFLM
    model = backend(
        pretrained=loaded.model.eval(), tokenizer=loaded.tokenizer, batch_size=batch, device=str(subject.runtime.device)
    )
    library = load_module(LIBRARY)
    out = library.simple_evaluate(
        model=model, tasks=tasks, num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False
    )
    return {name: _scores(name, out, limit, library.__version__) for name in out["results"]}


def _scores(name: str, out: dict[str, Any], limit: int | None, version: str) -> dict[str, Any]:
    """Return one task's scores as they are stored."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in out["results"][name].items():
        metric, _, kind = key.partition(",")
        if not kind or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        # Results of several filters of the answers stand under the name of the filter, too.
        label = metric if kind == "none" else f"{metric}/{kind}"
        if metric.endswith("_stderr"):
            errors[label.replace("_stderr", "", 1)] = float(value)
        else:
            metrics[label] = float(value)
    rows = out.get("n-samples", {}).get(name, {}).get("effective")
    facts = {"shots": out.get("n-shot", {}).get(name), "limit": limit, "rows": rows}
    return {"metrics": metrics, "errors": errors, **facts, "version": out.get("versions", {}).get(name), "library": version}


def write_task_scores(run: Path, scores: dict[str, dict[str, Any]]) -> None:
    """Add scores to those of a run; a task scored before is replaced."""
    write_text(run / TASK_SCORES, json.dumps({**read_task_scores(run), **scores}, indent=2, sort_keys=True) + "\n")


def rows_of_scores(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one line a metric for a table: task, metric, value, standard error, examples, documents."""
    return [
        {
            "task": task,
            "metric": metric,
            "value": value,
            "stderr": one["errors"].get(metric),
            "shots": one["shots"],
            "rows": one["rows"],
        }
        for task, one in found.items()
        for metric, value in one["metrics"].items()
    ]
