"""What the adapter of a few examples is worth on tasks of real text that the hypermodel was not trained on.

    python -m tests.benchmarks.fewshot_tasks --model shared/models/stories260k --data shared/data/fewshot_tasks

`--data` is a folder of train.jsonl, valid.jsonl and test.jsonl with rows of `task`, `prompt` and `completion` (24 templates of
P3). For each seed some tasks are held out, rows and all; the packaged recipe `hypertuning` trains on the others, and the
held-out rows of each unseen task are compared as in tests/methods/memory/test_hypertuning_tasks.py: the adapter of its own
examples with none, the mean adapter, that of another task's examples, and after a few steps of fine-tuning with an ordinary
one. Rows longer than LONGEST characters are left out. Results go to tests/benchmarks/results/fewshot_tasks.md and .json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.directions import verdict
from tests.benchmarks.stamp import RESULTS, line, machine_line, stamp
from tests.methods.memory.test_hypertuning_tasks import SHOTS, Row, compared
from tests.trainings import train_recipe

LONGEST = 400
UNSEEN = 6
"""Tasks held out from each seed's training."""
CONTROLS = {
    "none": "no adapter",
    "mean": "the mean of the adapters of the trained tasks",
    "other": "the adapter of another unseen task's examples",
    "scratch": "an ordinary adapter, both after 4 steps on the examples",
}


def tasks_of(folder: Path) -> dict[str, list[Row]]:
    """The rows of each task that has enough short ones, training rows first."""
    found: dict[str, list[Row]] = {}
    for split in ("train", "valid", "test"):
        for text in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(text)
            if len(row["prompt"]) + len(row["completion"]) <= LONGEST:
                found.setdefault(row["task"], []).append({k: row[k] for k in ("task", "prompt", "completion")})
    return {task: rows for task, rows in sorted(found.items()) if len(rows) >= 4 * SHOTS}


def written(path: Path, tasks: dict[str, list[Row]]) -> Path:
    """All rows of some tasks as a file."""
    rows = [row for rows in tasks.values() for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def gains(place: Path, seed: int, tasks: dict[str, list[Row]], model: str, steps: int) -> dict[str, list[float]]:
    """Train with some tasks held out, and compare on them."""
    names = sorted(tasks)
    random.Random(seed).shuffle(names)
    unseen, seen = ({name: tasks[name] for name in part} for part in (names[:UNSEEN], names[UNSEEN:]))
    place.mkdir(parents=True)
    train, held = written(place / "train.jsonl", seen), written(place / "held.jsonl", unseen)
    data = [f"data.path={train}", f"data.validation={held}", "data.test=null", "data.max_length=384"]
    quiet = ["eval.at_start=false", "eval.batches=1", "eval.load_best=false", "eval.samples=0"]
    words = [f"model.path={model}", f"seed={seed}", f"steps={steps}", "objective.shot_tokens=512", *data, *quiet]
    train_recipe(place / "run", "hypertuning", *words)
    return compared(place, place / "run", seen, unseen)


def main() -> None:
    """Every seed in turn, and the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a decoder")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tasks = tasks_of(given.data)
    with tempfile.TemporaryDirectory() as place:
        seeds = [gains(Path(place) / str(s), s, tasks, given.model, given.steps) for s in range(given.seeds)]
    rows: list[dict[str, Any]] = []
    for control in CONTROLS:
        values = [gain for seed in seeds for gain in seed[control]]
        mean, error = statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
        rows.append({"control": control, "gain": mean, "error": error, "tasks": len(values), "verdict": verdict(mean, error)})
    sizes = f"{len(tasks)} tasks, of which {UNSEEN} are held out from each training; seeds: {given.seeds}; {given.steps} steps"
    facts = {"model": Path(given.model).name, "sizes": sizes, "rows": rows, "harness": stamp("fewshot_tasks")}
    (given.results / "fewshot_tasks.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    table = [
        f"| {CONTROLS[r['control']]} | {r['gain']:+.4f} ± {r['error']:.4f} | {r['tasks']} | {r['verdict']} |" for r in rows
    ]
    text = [
        "# The adapter of a few examples on unseen tasks of real text\n",
        "Written by `python -m tests.benchmarks.fewshot_tasks`: nats a token on held-out rows by which the adapter that a",
        f"hypermodel writes for {SHOTS} examples of a task is better than a control; confirmed: above two standard errors, not",
        "reproduced: below minus two of them.\n",
        f"Model {facts['model']}, {sizes} of the recipe `hypertuning`.\n",
        "| control | gain ± s.e. | comparisons | verdict |",
        "| --- | --- | --- | --- |",
        *table,
        "",
        machine_line(),
        line(stamp("fewshot_tasks")),
    ]
    (given.results / "fewshot_tasks.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(table))


if __name__ == "__main__":
    main()
