"""Several runs in one process of a group: `worker.py CASES FOLDER`, started by `launch` or alone.

CASES is a JSON file, name -> [recipe, overrides...], or ["resume=RUN", overrides...] of a run that has begun. Each process
writes `FOLDER/<name>/rank<r>.safetensors` with what its own
model learned and `rank<r>.json` with what it saw, or the error that stopped the case on every process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file

from llmrecipe.core.errors import UserError
from llmrecipe.engine.sampling import Sampling
from llmrecipe.objectives.alignment._engines import rollout
from llmrecipe.recipe.compose import compose
from llmrecipe.training.run import Run
from llmrecipe.training.train import train
from tests.trainings import QUIET

SHORT = ["batch.size=8", "batch.micro=2", "data.limit=10", "steps=2", "save.every=1", "eval.batches=1", "eval.load_best=false"]
"""Ten rows in batches of eight: the second step has two rows, one a process; a checkpoint after the first."""


def same_answers(made: Callable[..., Any]) -> Callable[..., Any]:
    """A way to sample whose random stream belongs to the prompt and its turn, the same on any number of processes."""

    def sampled(model: Any, tokenizer: Any, prompts: list[list[int]], how: Sampling, **_: Any) -> Any:
        turns: dict[tuple[int, ...], int] = {}
        keys = []
        for prompt in prompts:
            turn = turns[tuple(prompt)] = turns.get(tuple(prompt), 0) + 1
            keys.append(f"{prompt}/{turn}")
        return made(model, tokenizer, prompts, dataclasses.replace(how, seed=0), keys=keys)

    return sampled


def one(folder: Path, words: list[str], rank: int, world: int) -> dict[str, Any]:
    """One run, and what this process has to say of it."""
    begun = Path(words[0].removeprefix("resume=")) if words[0].startswith("resume=") else None
    overrides = [*([] if begun else [*QUIET, *SHORT, f"run.dir={folder / 'run'}"]), f"runtime.processes={world}", *words[1:]]
    try:
        run: Run = train(compose(begun / "recipe.yaml" if begun else words[0], overrides), begun)
    except UserError as error:
        return {"error": str(error)}
    with run.whole(write=True):
        tensors = {n: t.detach().contiguous().clone() for n, t in run.stack.delta(run.model).items()}
    save_file(tensors, str(folder / f"rank{rank}.safetensors"))
    return {"world": run.runtime.world, "rank": run.runtime.rank}


def main() -> None:
    """Every case in turn, on every process."""
    # One group for all runs: the launcher's store knows a group's keys from the first time it was formed.
    dist.destroy_process_group = lambda *_: None
    for name in ("generate", "generate_scored"):
        setattr(rollout, name, same_answers(getattr(rollout, name)))
    cases, folder = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    for name, words in cases.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        found = one(folder / name, words, rank, world)
        (folder / name / f"rank{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
