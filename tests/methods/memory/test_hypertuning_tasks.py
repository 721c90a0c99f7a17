"""A planted family of tasks: what the adapter of a few examples is worth on tasks that were never trained.

Each task of the built-in namings has two words of its own, one for animals and one for things. The held-out rows of every
unseen task are answered without an adapter, with the mean of the adapters of the training tasks, with that of another task's
examples and with that of its own; and the adapter is fine-tuned, and an ordinary one as it starts, for the same few steps.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmrecipe.core.forward_context import Context, activate
from llmrecipe.core.registry import PACKAGE
from llmrecipe.data.collate import Sequence as Tokens
from llmrecipe.data.collate import pad
from llmrecipe.engine.forward import Engine
from llmrecipe.evaluation.adapt import adapt, fill_adapter
from llmrecipe.interop.load_run import open_run
from llmrecipe.methods.memory.hypertuning import Hypertuning
from tests.trainings import QUIET, events, train_recipe

SHOTS = 5
"""Examples of a task; its other rows are held out."""
TUNED = 4
"""Tasks of each seed that are fine-tuned."""
Row = dict[str, Any]


def rows_by_task(split: str) -> dict[str, list[Row]]:
    """The rows of each task of a split that has enough of them."""
    found: dict[str, list[Row]] = {}
    for line in (PACKAGE / "assets" / "data" / "namings" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["task"], []).append(row)
    return {task: rows for task, rows in found.items() if len(rows) >= 2 * SHOTS}


def two_errors_apart(differences: Sequence[float]) -> bool:
    """Whether a mean is more than two standard errors above zero."""
    return statistics.mean(differences) > 2 * statistics.stdev(differences) / len(differences) ** 0.5


@dataclass
class Trained:
    """A finished hypermodel, and a model with an ordinary adapter at the same sites."""

    run: Path
    adapted: Path

    def __post_init__(self) -> None:
        loaded = open_run(str(self.run))
        self.writer = next(w for w in loaded.mounted if isinstance(w, Hypertuning))
        self.hypermodel = self.writer.hypermodel(loaded.model).eval()
        own = open_run(str(self.adapted))
        self.model, self.tokenizer, self.name = own.model.eval(), own.tokenizer, own.mounted[0].name

    def ids(self, row: Row) -> tuple[list[int], list[int]]:
        """Prompt and answer as training reads them."""
        end, begin = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        read = [self.tokenizer(row[key], add_special_tokens=False).input_ids for key in ("prompt", "completion")]
        return ([] if begin is None else [begin]) + read[0], [*read[1], end]

    @torch.no_grad()
    def written(self, rows: Sequence[Row]) -> list[Tensor]:
        """The adapter of some examples."""
        ids = [token for row in rows for part in self.ids(row) for token in part]
        return self.hypermodel((torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)))

    @torch.no_grad()
    def loss(self, rows: Sequence[Row], written: Sequence[Tensor] | None) -> float:
        """Nats a token of the answers under an adapter, or under none."""
        if written is not None:
            fill_adapter(self.model, self.writer, self.name, written)
        pairs = [self.ids(row) for row in rows]
        batch = pad([Tokens([*p, *a], [0] * len(p) + [1] * len(a)) for p, a in pairs], 0)
        with activate(Context(off=frozenset() if written is not None else frozenset({self.name}))):
            return -float(Engine(self.model)(batch)["logprobs"].mean())


def written_file(path: Path, rows: Sequence[Row]) -> Path:
    """Rows as a file of prompts with answers."""
    path.write_text("".join(json.dumps({k: r[k] for k in ("prompt", "completion")}) + "\n" for r in rows), encoding="utf-8")
    return path


def trained(folder: Path, seed: int) -> Path:
    """The packaged recipe with a seed."""
    train_recipe(folder / "run", "hypertuning", f"seed={seed}", "eval.at_start=false", "eval.batches=1")
    return folder / "run"


def tuned(folder: Path, adapted: Path, shots: Path, held: Path, *words: str) -> float:
    """Loss of held-out rows after a few steps on the examples."""
    steps = ["steps=4", f"batch.size={SHOTS}", "optim.lr=1e-2", "schedule=constant", "schedule.warmup=0"]
    rows = [f"data.path={shots}", f"data.validation={held}", "eval.at_start=false", "eval.load_best=false"]
    train_recipe(folder, str(adapted), *steps, *rows, *words)
    return float(events(folder, "evaluation")[-1]["eval/loss"])


def compared(place: Path, run: Path, seen: dict[str, list[Row]], unseen: dict[str, list[Row]]) -> dict[str, list[float]]:
    """Nats a token by which the adapter of a task's examples is better than each control, on held-out rows of unseen tasks.

    `none`: no adapter; `mean`: of the adapters of the tasks that were trained; `other`: that of the next task's examples;
    `scratch`: an ordinary adapter after the same few steps on the examples as the written one.
    """
    over: dict[str, list[float]] = {"none": [], "mean": [], "other": [], "scratch": []}
    names = list(unseen)
    folders = {}
    for i, task in enumerate(names[:TUNED]):
        shots = written_file(place / f"{i}.shots.jsonl", unseen[task][:SHOTS])
        folders[task] = adapt(str(run), [f"data.path={shots}", f"run.dir={place / f'adapted{i}'}", *QUIET])[0]
    found = Trained(run, folders[names[0]])
    each = [found.written(rows[:SHOTS]) for rows in seen.values()]
    mean = [torch.stack(blocks).mean(0) for blocks in zip(*each, strict=True)]
    for task, other in zip(names, [*names[1:], names[0]], strict=True):
        held = unseen[task][SHOTS:]
        own = found.loss(held, found.written(unseen[task][:SHOTS]))
        over["none"].append(found.loss(held, None) - own)
        over["mean"].append(found.loss(held, mean) - own)
        over["other"].append(found.loss(held, found.written(unseen[other][:SHOTS])) - own)
    for i, (task, adapted) in enumerate(folders.items()):
        held, shots = written_file(place / f"{i}.held.jsonl", unseen[task][SHOTS:]), place / f"{i}.shots.jsonl"
        going_on = [f"model.path={adapted}", "model.continue=true"]
        warm = tuned(place / f"warm{i}", adapted, shots, held, *going_on)
        over["scratch"].append(tuned(place / f"cold{i}", adapted, shots, held) - warm)
    return over


def gains(place: Path, seed: int) -> dict[str, list[float]]:
    """The comparison on the tasks of the built-in namings that no training row has."""
    return compared(place, trained(place, seed), rows_by_task("train"), {**rows_by_task("valid"), **rows_by_task("test")})


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_adapter_of_an_unseen_task_beats_its_controls(tmp_path: Path) -> None:
    seeds = [gains(tmp_path / str(seed), seed) for seed in range(3)]
    over = {name: [gain for own in seeds for gain in own[name]] for name in seeds[0]}
    assert [name for name, values in over.items() if not two_errors_apart(values)] == []
