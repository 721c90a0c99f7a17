"""What both sides of the harness do: cases, and the commands that train in this program and in TRL."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

AGAINST = ("defaults", "defaults_bfloat16", "defaults_recompute", "best_float32", "best_bfloat16")
BATCH = {"sft": 8, "dpo": 4, "grpo": 4}
"""Rows of a step: documents, pairs, prompts."""
STEPS = {"tiny": 6, "10m": 16, "60m": 8}
BETA = {"dpo": 0.1, "grpo": 0.0}
"""TRL's own."""
ANSWERS = 8
NEW_TOKENS = {"chat": 48, "long_answers": 80}
"""Tokens of a sampled answer: two thirds of a mean prompt, and twice one."""
LORA = {"r": 16, "alpha": 32}
TARGET = "attn.q|k|v|o + mlp.gate|up|down"
LEARNING_RATE, SEED = 1e-3, 0


@dataclass(frozen=True)
class Case:
    """What both sides do."""

    recipe: str
    shape: str
    against: str
    steps: int
    workload: str = "chat"
    beta: float | None = None
    """Weight of the divergence from the reference; None takes TRL's own."""

    @property
    def task(self) -> str:
        """`sft`, `dpo` or `grpo`."""
        return self.recipe.split("_")[0]

    @property
    def samples(self) -> bool:
        """Whether answers are sampled."""
        return self.task == "grpo"

    @property
    def divergence(self) -> float | None:
        """The weight of the divergence; None without one."""
        return BETA.get(self.task) if self.beta is None else self.beta

    @property
    def passes(self) -> int:
        """Two where the peer scores the reference beforehand, so that both kinds of step are seen."""
        return 2 if self.task == "dpo" and self.setting == "best" else 1

    @property
    def setting(self) -> str:
        """Of the peer: `defaults` or `best`."""
        return self.against.split("_")[0]

    @property
    def dtype(self) -> str | None:
        """The stated precision, or None where this program keeps its own default; TRL keeps its own under `defaults`."""
        return "bfloat16" if self.recompute else self.against.partition("_")[2] or None

    @property
    def recompute(self) -> bool:
        """Whether this program recomputes activations; TRL does under `defaults`."""
        return self.against == "defaults_recompute"

    @property
    def shown(self) -> str:
        """The number of a step's event that says what was learned: the loss, or the reward of the answers."""
        return "objective/scores" if self.samples else "loss"

    @property
    def name(self) -> str:
        """Of a line of the table."""
        parts = [self.recipe]
        parts += [f"beta {self.beta:g}"] if self.beta is not None else []
        return ", ".join([*parts, *(["long answers"] if self.workload == "long_answers" else [])])


def peer_command(case: Case, model: Path, data: Path, out: Path) -> tuple[list[str], Path]:
    """The command that trains in TRL, and its event file."""
    events = out / "events.jsonl"
    spec = {
        "task": case.task,
        "model": str(model),
        "data": str(data),
        "out": str(out),
        "events": str(events),
        "setting": case.setting,
        "passes": case.passes,
        "dtype": case.dtype,
        "batch": BATCH[case.task],
        "pack": 512,
        "packs": 2,
        "answers": ANSWERS,
        "new_tokens": NEW_TOKENS[case.workload],
        "lr": LEARNING_RATE,
        "beta": case.divergence,
        "seed": SEED,
        **LORA,
    }
    (out / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    return [sys.executable, str(HERE / "peer.py"), str(out / "spec.json")], events


def product_command(case: Case, model: Path, data: Path, out: Path) -> tuple[list[str], Path]:
    """The command line of this program, and its event file."""
    run = out / "run"
    overrides = [
        f"recipe={case.recipe}",
        f"model.path={model}",
        f"data.path={data}",
        f"run.dir={run}",
        f"stack.lora.r={LORA['r']}",
        f"stack.lora.alpha={LORA['alpha']}",
        f'stack.lora.target="{TARGET}"',
        f"optim.lr={LEARNING_RATE}",
        "optim.weight_decay=0.0",
        "schedule=constant",
        f"batch.size={BATCH[case.task]}",
        f"steps={case.steps * case.passes}",
        f"seed={SEED}",
        "runtime.threads=1",
        "eval.at_start=false",
        "data.max_length=1024",
        "data.cache=false",
        *([f"objective.beta={case.divergence}"] if case.divergence is not None else []),
        *(sampling(case) if case.samples else []),
        *([f"model.dtype={case.dtype}"] if case.dtype else []),
        *(["model.gradient_checkpointing=true"] if case.recompute else []),
    ]
    start = "import sys; from llmrecipe.cli.app import main; sys.exit(main())"
    return [sys.executable, "-c", start, "train", *overrides], run / "events.jsonl"


def sampling(case: Case) -> list[str]:
    """Words of this program alone where answers are sampled; its other options are TRL's defaults too."""
    return [
        f"objective.answers={ANSWERS}",
        f"objective.max_new_tokens={NEW_TOKENS[case.workload]}",
        "objective.reward={function: {function: even_words}}",
        "plugins=[tests.benchmarks.rewards]",
    ]
