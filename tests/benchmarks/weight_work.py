"""CPU time of an optimizer step whose method works on weights, against full fine-tuning, by rows and micro-batches.

Work that depends on weights only (gates of diff pruning, the sums in place of weights) is done once a step, so the ratio falls
with both.

python -m tests.benchmarks.weight_work
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch

from llmrecipe.core import registry
from llmrecipe.data.collate import Sequence, pad
from llmrecipe.engine.forward import Engine
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.hooks.shared_weights import shared_weights
from tests.tiny import tiny_model

SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "vocab_size": 512}
ROWS, TOKENS = 8, 128
"""Of a micro-batch."""


def step(model: Any, stack: Stack, optimizer: Any, micros: int, number: int, rows: int = ROWS) -> float:
    """CPU seconds of one step."""
    generator = torch.Generator().manual_seed(number)
    engine = Engine(model)
    batches = [
        pad([Sequence(torch.randint(3, 500, (TOKENS,), generator=generator).tolist(), [1] * TOKENS) for _ in range(rows)], 0)
        for _ in range(micros)
    ]
    started = time.process_time()
    stack.before_step(model, number)
    with shared_weights(model, micros) as finish_micro:
        for index, batch in enumerate(batches):
            loss = -engine(batch)["logprobs"].mean() / micros
            if index == micros - 1:
                loss = loss + stack.penalty(model)
            loss.backward()
            finish_micro()
    optimizer.step()
    stack.after_step(model, number)
    optimizer.zero_grad(set_to_none=True)
    return time.process_time() - started


def subject(kinds: list[str]) -> tuple[Any, Stack, Any]:
    """A model, its stack and its optimizer."""
    model = tiny_model("llama", scale=1.0, **SHAPE)
    stack = Stack([registry.load_class("stack", kind)(name=kind) for kind in kinds])
    stack.attach(model)
    return model, stack, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def main() -> None:
    """One JSON line a number of micro-batches; both methods take turns."""
    torch.set_num_threads(1)
    for rows, micros in ((1, 1), (ROWS, 1), (ROWS, 2), (ROWS, 8)):
        pair = {"full": subject([]), "diff_pruning": subject(["diff_pruning"])}
        times: dict[str, list[float]] = {name: [] for name in pair}
        for number in range(3):
            for name, parts in pair.items():
                times[name].append(step(*parts, micros, number, rows))
        best = {name: min(found[1:]) for name, found in times.items()}
        print(
            json.dumps(
                {
                    "rows": rows,
                    "micros": micros,
                    **{k: round(v, 3) for k, v in best.items()},
                    "ratio": round(best["diff_pruning"] / best["full"], 2),
                }
            )
        )


if __name__ == "__main__":
    main()
