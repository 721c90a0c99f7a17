"""What MeZO makes of metrics that have no gradient, on held-out test rows of the built-in sets.

    python -m tests.benchmarks.zeroth_order [--seeds 3] [--tasks accuracy token_f1 exact_match]

Each task trains a LoRA by forward passes alone on the metric itself. Rates and steps were chosen on training and validation
rows; test rows are read for the start and for what training left, once each. A metric that is 0 everywhere has no slope, so
`exact_match` starts with each seed from a model of its own, whose weights a few steps of fine-tuning have taught the form of
the answers: as many as first bring the metric of validation rows into START. Results go to
tests/benchmarks/results/zeroth_order.md and .json, where those of other tasks stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmrecipe.core.registry import PACKAGE
from llmrecipe.evaluation.evaluate_model import evaluate_path
from tests.benchmarks.stamp import RESULTS, line, machine_line, stamp
from tests.trainings import events, train_recipe

DATA = PACKAGE / "assets" / "data"
PLAIN = ("epochs=null", "schedule=constant", "schedule.warmup=0", "eval.load_best=false", "eval.samples=0")
MEZO = (*PLAIN, "stack=[lora,mezo]", "stack.mezo.n=1", "optim=sgd", "eval.at_start=false")
SPLITS = {"path": "train", "validation": "valid", "test": "test"}
START = (0.2, 0.6)
"""The metric of a start on validation rows."""


@dataclass(frozen=True)
class Task:
    """A metric that is trained, and the words of its run."""

    what: str
    recipe: str
    objective: str
    rows: str
    """Built-in set."""
    metric: str
    words: tuple[str, ...]
    scored: tuple[str, ...] = ()
    """Words that training and every reading of rows share."""
    first: tuple[str, ...] = ()
    """Words of the training of all weights that comes first; none: the model is the embedded one."""


TASKS = {
    "accuracy": Task(
        "of two answers the better one ranks first", "choices", "choices", "preference", "rank_accuracy",
        ("objective.loss_type=error", "stack.mezo.eps=1e-2", "optim.lr=5e-3", "batch.size=32", "steps=80"),
    ),
    "token_f1": Task(
        "words of the written answer", "sft_lora", "sft", "sft", "token_f1",
        ("objective.loss_type=metric", "objective.metric=token_f1", "objective.max_new_tokens=16", "stack.mezo.eps=3e-2",
         "stack.mezo.clip_projected_grad=1", "optim.lr=1e-2", "batch.size=32", "steps=120"),
        ("eval.metrics=[token_f1]", "eval.max_new_tokens=16"),
    ),
    "exact_match": Task(
        "the written answer to a question about a text", "sft_lora", "sft", "passages", "exact_match",
        ("objective.loss_type=metric", "objective.max_new_tokens=10", "stack.mezo.eps=3e-2", "stack.mezo.clip_projected_grad=1",
         "optim.lr=1e-2", "batch.size=32", "steps=80"),
        ("eval.metrics=[exact_match]", "eval.max_new_tokens=10"),
        ("batch.size=16", "optim.lr=2e-4", "steps=16"),
    ),
}  # fmt: skip


LIMITS = """\
The accuracy row has the first protocol that was tried, with rates chosen on validation rows with seed 0; version 1 of this
benchmark measured it, with the same words. The other two share a rate and a perturbation that were found with seed 100 on F1:
three times the rate lost every answer within ten steps, and a LoRA of rank 1 moved by 0.1 within forty; the bound on the
projected gradient was added after that, untuned. That exact match takes 80 steps and not 40 was decided on validation rows of
all seeds, before any test row was read; the gains there were 0.44, 0.24 and 0.12 after 40 and 0.33, 0.23 and 0.39 after 80.

Exact match starts from a model of each seed's own, after the first step of fine-tuning that leaves 0.2 to 0.6 on validation
rows. The embedded model answers most of the questions, but with a full stop that the reference lacks: what rises is the form
more than the knowledge. Labels of `classify` were tried before and do not rise reliably: from starts of their own two seeds
gained 0.245 and 0.025, a third nothing in thirty steps."""


def data(folder: Path, task: Task) -> list[str]:
    """Words that name the rows of a task, and how they are scored; passages become questions, written into the folder."""
    files = [(key, DATA / task.rows / f"{split}.jsonl") for key, split in SPLITS.items()]
    if task.rows == "passages":
        files = [(key, asked(path, folder / path.name)) for key, path in files]
    return [*(f"data.{key}={path}" for key, path in files), *task.scored]


def asked(path: Path, place: Path) -> Path:
    """Write passages as dialogues: the passage and its question, then the answer."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with path.open(encoding="utf-8") as lines, place.open("w", encoding="utf-8") as out:
        for row in map(json.loads, lines):
            turns = [f"{row['context']} {row['question']}", row["answers"]["text"][0]]
            pair = [{"role": role, "content": turn} for role, turn in zip(("user", "assistant"), turns, strict=True)]
            out.write(json.dumps({"messages": pair}) + "\n")
    return place


def start(folder: Path, task: Task, seed: int) -> str:
    """Return the model a seed starts from: the embedded one, or one trained until validation rows are partly right.

    Raises:
        ValueError: no reading of the validation rows is inside START.
    """
    if not task.first:
        return "tiny"
    words = [*PLAIN, *data(folder, task), *task.first, f"seed={seed}", "eval.at_start=false"]
    train_recipe(folder / "search", "sft", *words, "eval.every=1", "save.end=false")
    read = [(e["step"], e[f"eval/{task.metric}"]) for e in events(folder / "search", "evaluation")]
    steps = next((step for step, value in read if START[0] <= value <= START[1]), None)
    if steps is None:
        raise ValueError(f"seed {seed}: no start with {task.metric} in {START}: {read}")
    train_recipe(folder / "start", "sft", *words, f"steps={steps}")
    return str(folder / "start")


def trained(folder: Path, task: Task, seed: int) -> tuple[str, str]:
    """Return the model a seed starts from, and the run that MeZO left."""
    begin, run = start(folder, task, seed), str(folder / "run")
    words = [*MEZO, *data(folder, task), *task.words, f"model.path={begin}", f"seed={seed}"]
    train_recipe(Path(run), task.recipe, *words)
    return begin, run


def score(path: str, folder: Path, task: Task, split: str = "test") -> float:
    """Return the metric of a model or run on a split."""
    return evaluate_path(path, [f"objective={task.objective}", *data(folder, task)], split)[task.metric]


def measured(folder: Path, task: Task, seed: int) -> tuple[float, float]:
    """Return the metric on test rows before and after training."""
    before, after = (score(path, folder, task) for path in trained(folder, task, seed))
    return before, after


def main() -> None:
    """Every task with every seed, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    place = given.results / "zeroth_order.json"
    known: list[dict[str, Any]] = json.loads(place.read_text(encoding="utf-8"))["rows"] if place.is_file() else []
    rows = {row["task"]: row for row in known}
    for name in given.tasks:
        task = TASKS[name]
        with tempfile.TemporaryDirectory() as folder:
            pairs = [measured(Path(folder) / str(seed), task, seed) for seed in range(given.seeds)]
        rows[name] = {"task": name, "what": task.what, "metric": task.metric, "before_after": pairs}
        print(name, pairs, flush=True)
    written(rows, given.results, given.seeds)


def written(rows: dict[str, dict[str, Any]], folder: Path, seeds: int) -> None:
    """Write what was measured of each task as JSON and as a table."""
    facts = {"rows": list(rows.values()), "harness": stamp("zeroth_order")}
    (folder / "zeroth_order.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    table = []
    for row in rows.values():
        pairs = row["before_after"]
        gains = [after - before for before, after in pairs]
        shown = ", ".join(f"{before:.3f} to {after:.3f}" for before, after in pairs)
        table.append(f"| {row['what']} | {row['metric']} | {shown} | {statistics.fmean(gains):+.3f} | {min(gains):+.3f} |")
    text = [
        "# Metrics without a gradient\n",
        "Written by `python -m tests.benchmarks.zeroth_order`: MeZO trains a LoRA of the embedded model on the metric itself,",
        f"by forward passes alone; the metric on the test rows before and after, for seeds 0 to {seeds - 1}.\n",
        "| what | metric | before to after, seed by seed | mean gain | least gain |",
        "| --- | --- | --- | --- | --- |",
        *table,
        "",
        f"{LIMITS}\n",
        machine_line(),
        line(stamp("zeroth_order")),
    ]
    (folder / "zeroth_order.md").write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
