"""One cell of `gpu.py`: `python -m tests.benchmarks.gpu_cell SPEC.json`, started in a process of its own.

The product's side composes a recipe and trains it as the command line does; the peers' are the trainers of Transformers and
TRL with PEFT. The spec names the cell, model folder, rows and device; what was measured is written beside it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu_flops import SHAPES, step_flops
from tests.benchmarks.gpu_work import (
    DETERMINISTIC,
    LORA,
    SEED,
    SIZES,
    Cell,
    Meter,
    Size,
    build_model,
    longest,
    rows_per_step,
    write_cell_rows,
    write_json,
)

TARGET = "attn.q|k|v|o + mlp.gate|up|down"
RECIPES = {
    ("sft", "lora"): ("sft_lora",),
    ("sft", "qlora"): ("qlora",),
    ("sft", "full"): ("sft",),
    ("dpo", "lora"): ("dpo_lora",),
    ("dpo", "qlora"): ("dpo_lora", "stack=[nf4,lora]", "optim=paged_adamw_32bit"),
    ("dpo", "full"): ("dpo",),
    ("grpo", "lora"): ("grpo",),
    ("grpo", "qlora"): ("grpo", "stack=[nf4,lora]", "optim=paged_adamw_32bit"),
    ("grpo", "full"): ("grpo", "stack=[]"),
}
RATE = 1e-4
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest relative difference of a loss on the device from that on the CPU."""
LEAST = 1e-6
"""Loss that a smaller one counts as there."""


def words_of(cell: Cell, size: Size, model: Path, data: Path, out: Path, device: str) -> tuple[str, list[str]]:
    """The recipe and the words of the command line."""
    recipe, *more = RECIPES[cell.task, cell.method]
    words = [
        *more,
        f"model.path={model}",
        f"model.dtype={cell.dtype}",
        f"data.path={data}",
        f"data.max_length={longest(cell, size)}",
        "data.cache=false",
        f"batch.size={rows_per_step(cell, size)}",
        f"steps={size.steps}",
        f"seed={SEED}",
        "schedule=constant",
        f"optim.lr={RATE}",
        "optim.weight_decay=0.0",
        "eval.at_start=false",
        "eval.test=false",
        "log.live=off",
        f"run.dir={out / f'run-{device}'}",
        f"runtime.device={device}",
    ]
    words += cell.words.split()
    if cell.method != "full":
        words += [f"stack.lora.r={LORA['r']}", f"stack.lora.alpha={LORA['alpha']}", f'stack.lora.target="{TARGET}"']
    if cell.task == "grpo":
        words += [
            f"objective.answers={size.answers}",
            f"objective.max_new_tokens={size.new}",
            f"objective.reward={{length: {{most: {4 * size.new}, slack: {4 * size.new}, unit: characters}}}}",
        ]
    return recipe, words


@contextlib.contextmanager
def metered(meter: Meter) -> Iterator[None]:
    """The meter sees every step a run reports."""
    from llmrecipe.training.run import Run

    original = Run.report_step

    def report(self: Run, result: Any, micros: Any, seconds: float) -> None:
        meter.step(result.loss, self.progress.tokens)
        original(self, result, micros, seconds)

    Run.report_step = report  # type: ignore[method-assign]
    try:
        yield
    finally:
        Run.report_step = original  # type: ignore[method-assign]


def product(cell: Cell, size: Size, model: Path, data: Path, out: Path, device: str, meter: Meter) -> None:
    """Compose and train, as `llmrecipe train` does."""
    from llmrecipe import compose, train

    recipe, words = words_of(cell, size, model, data, out, device)
    with metered(meter):
        train(compose(recipe, words))


def on_cpu(cell: Cell) -> Cell:
    """The cell with those of its further words that decide what is computed, and none that decide how."""
    return replace(cell, words=" ".join(word for word in cell.words.split() if word.startswith(("stack=", "optim="))))


def equality(spec: dict[str, Any], cell: Cell, size: Size) -> dict[str, Any]:
    """The same recipe and rows on the CPU and on the device: losses of every step, and their largest relative difference.

    Where only deterministic kernels are allowed, the device is compared with itself, and nothing may differ.
    """
    losses, again = {}, DETERMINISTIC in cell.words
    first = ("cpu", spec["device"], cell) if again else ("cpu", "cpu", on_cpu(cell))
    for side, device, own in (first, ("device", spec["device"], cell)):
        meter = Meter(spec["began"], device)
        out = Path(spec["out"]) / side
        out.mkdir(parents=True, exist_ok=True)
        product(own, size, Path(spec["model"]), Path(spec["data"]), out, device, meter)
        losses[side] = meter.losses
    return {**losses, **compared(losses["cpu"], losses["device"], 0.0 if again else TOLERANCE[cell.dtype])}


def compared(cpu: list[float], device: list[float], tolerance: float) -> dict[str, Any]:
    """max |b - a| / |a| over steps, and whether that is within the tolerance; a loss may begin at zero."""
    largest = max(abs(b - a) / max(abs(a), LEAST) for a, b in zip(cpu, device, strict=True))
    return {"difference": largest, "tolerance": tolerance, "equal": bool(largest <= tolerance)}


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Run a cell.

    Args:
        spec: cell, size, model, data and out folder, device, began (`time.time()` of the process's start).
    """
    cell, size = Cell(**spec["cell"]), SIZES[spec["size"]]
    Path(spec["out"]).mkdir(parents=True, exist_ok=True)
    lengths = write_cell_rows(cell, size, Path(spec["data"]))
    if cell.task == "generate":
        from tests.benchmarks import gpu_decoding

        return gpu_decoding.measure(spec, cell, size)
    if cell.kind == "equal":
        return equality(spec, cell, size)
    meter = Meter(spec["began"], spec["device"], cell.kind == "profile")
    if cell.side == "product":
        product(cell, size, Path(spec["model"]), Path(spec["data"]), Path(spec["out"]), spec["device"], meter)
        settings: dict[str, Any] = {}
    else:
        from tests.benchmarks import gpu_peer

        settings = gpu_peer.train(cell, size, spec, meter)
    shape, reference = SHAPES[cell.shape], cell.task == "dpo"
    own = cell.side != "product" and cell.task != "grpo"
    found = meter.report(lengths, lambda seen: step_flops(shape, seen, cell.method, reference), own)
    if cell.task == "grpo":
        # Sampling answers is bound by memory, not by products: no share of the peak means anything.
        del found["tflops_per_s"]
    return {**found, "settings": settings}


def main(path: Path) -> None:
    """Build a model folder, or run a cell, and write what came out beside the spec."""
    spec = json.loads(path.read_text(encoding="utf-8"))
    if "build" in spec:
        build_model(Path(spec["model"]), spec["build"], spec["device"], spec["dtype"])
        found: dict[str, Any] = {}
    else:
        found = measure(spec)
    write_json(path.with_name("found.json"), found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
