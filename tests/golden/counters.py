"""Counters of one optimizer step that no clock disturbs: floating-point operations, operator calls, bytes alive at the peak.

A cell is a recipe at a shape. What is counted is the first step of the loop, from drawing its rows to the optimizer's update,
with the optimizer's state; tensors that were there before it do not count.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from llmrecipe.training import first_update
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
QUIET = ["steps=1", "data.limit=64", "save.end=false"]


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
    from tests.trainings import Run, train_recipe

    counter = Counter()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as inside:
        inside.enter_context(redirect_stdout(StringIO()))
        inside.enter_context(one_thread())
        feed = Run.feed
        patch.setattr(Run, "feed", lambda run: (counter.begin(), feed(run))[1])
        patch.setattr(Run, "due_evaluation", lambda run, step, at_start=False: False)
        patch.setattr(Run, "finish", lambda run: counter.end())
        # Made once in a run, these are no cost of a step.
        patch.setattr(first_update, "watched", lambda model: {})
        patch.setattr(first_update.FirstUpdate, "compare", lambda first, result: None)
        try:
            train_recipe(Path(folder) / "run", words[0], *QUIET, *words[1:])
        finally:
            counter.end()
    return counter.found


class Counter:
    """What counts between the moment a run asks for its rows and its end; a run that asks again counts on."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self.open: contextlib.ExitStack | None = None

    def begin(self) -> None:
        """Start to count."""
        if self.open is not None:
            return
        self.open = contextlib.ExitStack()
        self.open.enter_context(_no_collection())
        there = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        self.calls = self.open.enter_context(Calls())
        self.flops = self.open.enter_context(FlopCounterMode(display=False, custom_mapping=ATTENTION))
        self.live = self.open.enter_context(PeakBytes(there))

    def end(self) -> None:
        """Stop to count."""
        if self.open is None or self.found:
            return
        self.open.close()
        self.found = {"flops": self.flops.get_total_flops(), "calls": self.calls.number, "bytes": self.live.peak}


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
