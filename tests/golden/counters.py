"""Counters of one optimizer step that no clock disturbs: floating-point operations, operator calls, bytes alive at the peak.

A cell is a recipe at a shape. What is counted is the first step of the loop, from drawing its rows to the optimizer's update,
with the optimizer's state; tensors that were there before it do not count.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tests.golden.runs import one_thread
from tests.support import PeakBytes

aten = torch.ops.aten
LIMITS = {"flops": 0.005, "calls": 0.02, "bytes": 0.02}
"""Counter -> how much it may grow, as a share of what is kept."""

CELLS: dict[str, list[str]] = {
    "clm 8": ["clm", "batch.size=8"],
    "sft 2x4": ["sft", "batch.size=8", "batch.micro=4"],
    "sft_lora 8": ["sft_lora", "batch.size=8"],
    "sft_lora 32": ["sft_lora", "batch.size=32"],
    "dora 8": ["dora", "batch.size=8"],
    "qlora 4": ["qlora", "batch.size=4"],
    "adapter 8": ["adapter", "batch.size=8"],
    "prefix_tuning 8": ["prefix_tuning", "batch.size=8"],
    "bitfit 8": ["bitfit", "batch.size=8"],
    "dpo_lora 8": ["dpo_lora", "batch.size=8"],
    "kto_lora 8": ["kto_lora", "batch.size=8"],
    "grpo 4": ["grpo", "batch.size=4", "objective.max_new_tokens=4"],
}
"""Name (recipe and rows a step) -> recipe and options."""
QUICK = ("sft 2x4", "sft_lora 8", "dora 8", "prefix_tuning 8", "dpo_lora 8", "kto_lora 8")
"""The cells of the fast suite."""
QUIET = ["steps=1", "data.limit=64", "data.cache=false", "eval.test=false", "log.live=off"]


class Calls(TorchDispatchMode):
    """Count the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def _forward(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


ATTENTION: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
"""Attention on a CPU, which torch does not count by itself."""


def count(words: list[str]) -> dict[str, int]:
    """Count the first optimizer step of a recipe with options."""
    from llmrecipe.recipe.compose import compose
    from llmrecipe.training.run import Run, start

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()), one_thread():
        run = Run(compose(words[0], [*QUIET, *words[1:], f"run.dir={Path(folder) / 'run'}"]))
        try:
            start(run)
            return _count_step(run)
        finally:
            run.events.close()
            run.runtime.close()


def _count_step(run: Any) -> dict[str, int]:
    from llmrecipe.training.loop import train

    run.validation, run.finish = None, lambda: None
    with _no_collection():
        there = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        flops = FlopCounterMode(display=False, custom_mapping=ATTENTION)
        with Calls() as calls, flops, PeakBytes(there) as live:
            train(run)
    return {"flops": flops.get_total_flops(), "calls": calls.number, "bytes": live.peak}


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector still inside: when it runs depends on everything else in the process."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def grown(kept: dict[str, Any], found: dict[str, int]) -> list[str]:
    """List the counters of a cell that are above their limit."""
    return [
        f"{name} {kept[name]:,} became {found[name]:,} ({100 * (found[name] / kept[name] - 1):+.2f} %)"
        for name, limit in LIMITS.items()
        if found[name] - kept[name] > limit * kept[name]
    ]
