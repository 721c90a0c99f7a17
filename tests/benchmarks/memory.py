"""What every parameter-efficient method holds in memory, counted in bytes, beside what its formula says.

python -m tests.benchmarks.memory [--out FOLDER]

Bytes, not times: the numbers are the same on every machine. A decoder of width 512 (an encoder for CoDA) reads 8 rows of 128
tokens and makes one step of AdamW; every count is taken from the tensors that are there.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmrecipe.core import registry
from llmrecipe.data.collate import Batch, Sequence, pad
from llmrecipe.engine.forward import Engine
from llmrecipe.optim.optimizer import build_optimizer, parameter_groups
from llmrecipe.training.memory_estimate import delta_bytes, optimizer_bytes, retained_bytes, saved_bytes
from tests.benchmarks.stamp import line, stamp
from tests.methods.formulas import FORMULAS, shape
from tests.methods.kinds import CHANGES, put, wrapper_of
from tests.tiny import tiny_config

WIDTH = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 4096}
OPTIONS: dict[str, dict[str, Any]] = {
    "fishmask": {"density": 0.005},
    "adapter": {"r": 32},
    "coda": {"r": 32, "reduction": 4.0, "eps": 1.0},
    "prefix_tuning": {"num_virtual_tokens": 30, "hidden": 512},
    "p_tuning_v2": {"num_virtual_tokens": 30},
    "prompt_tuning": {"num_virtual_tokens": 20},
    "apt": {"num_virtual_tokens": 30},
    "parallel_adapter": {"reduction": 2},
}
"""Sizes in use rather than those of tests."""
BUDGETS = {"group_mask": "at most density N", "spt": "at most budget N"}
ROWS, TOKENS = 8, 128


def model(kind: str) -> nn.Module:
    """A random model, alike for all decoders."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    from llmrecipe.models.attention import install_attention

    torch.manual_seed(0)
    if kind == "coda":
        made = AutoModelForMaskedLM.from_config(tiny_config("bert", max_position_embeddings=256, **WIDTH))
    else:
        made = AutoModelForCausalLM.from_config(
            tiny_config("llama", num_key_value_heads=4, max_position_embeddings=256, **WIDTH)
        )
    install_attention(made, "sdpa")
    return made.eval()


def batch(rows: int = ROWS, tokens: int = TOKENS) -> Batch:
    """Random rows, every token a target."""
    ids = torch.randint(3, WIDTH["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(1)).tolist()
    return pad([Sequence(row, [1] * tokens, prompt=1) for row in ids], 0)


def held(model: nn.Module) -> int:
    """Bytes of activations that one forward pass keeps for its backward pass, each storage once, weights left out."""
    there = list(chain(model.parameters(), model.buffers()))
    engine = Engine(model, None)
    loss, saved = saved_bytes(lambda: -engine(batch())["logprobs"].mean(), there)
    return max(saved, retained_bytes(loss, there))


def measured(kind: str) -> dict[str, Any]:
    """One row of the table."""
    base = model(kind)
    bare = shape(base)
    made = put(base, wrapper_of(kind, **OPTIONS.get(kind, {})))
    made.stack.before_step(made.model, 0)
    activations = held(made.model)
    trained = made.trained()
    adamw = registry.load_class("optim", "adamw")()
    optimizer = build_optimizer(adamw, parameter_groups(made.model, adamw, made.stack.groups(made.model)))
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    facts: Counter[str] = Counter()
    for part in made.stack:
        facts.update(part.memory(made.model))
    numbers = sum(p.numel() for p in trained.values())
    indices = facts.get("index_bytes", 0)
    # AdamW counts its steps in a number of its own for each tensor.
    moments = optimizer_bytes(optimizer) - 4 * len(trained)
    state = sum(p.nbytes + p.grad.nbytes for p in trained.values()) + moments + indices
    words, count = FORMULAS.get(kind, (BUDGETS.get(kind, ""), None))
    return {
        "method": kind,
        "formula": words,
        "gives": count(wrapper_of(kind, **OPTIONS.get(kind, {})), bare) if count else None,
        "trained": numbers,
        "indices": indices // 4,
        "16 and 4 bytes": 16 * numbers + indices,
        "state": state,
        "declared": numbers * 4 + facts["gradient_bytes"] + facts["optimizer_bytes"] + indices,
        "file": delta_bytes(made.model, made.stack),
        "activations": activations,
    }


def everything() -> nn.Module:
    """The base with all its weights open: what full fine-tuning keeps."""
    return model("full").requires_grad_(True)


def render(rows: list[dict[str, Any]], full: int) -> str:
    """The table in Markdown; kilobytes of 1,000 bytes."""
    names = (
        "method",
        "numbers trained",
        "formula gives",
        "counted",
        "state kB, formula",
        "measured",
        "file kB",
        "activations MB",
    )
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        gives = "" if row["gives"] is None else f"{row['gives']:,}"
        cells = [row["method"], row["formula"], gives, f"{row['trained']:,}"]
        cells += [f"{row[n] / 1e3:,.1f}" for n in ("16 and 4 bytes", "state", "file")]
        lines.append("| " + " | ".join([*cells, f"{row['activations'] / 1e6:.1f}"]) + " |")
    lines.append(f"| full fine-tuning | N | | | | | | {full / 1e6:.1f} |")
    return "\n".join(lines)


HEADER = f"""# What the methods hold in memory

Written by `python -m tests.benchmarks.memory`: bytes counted from the tensors themselves, so the same on every machine. A
decoder of width {WIDTH["hidden_size"]}, {WIDTH["num_hidden_layers"]} layers, feed-forwards of {WIDTH["intermediate_size"]:,},
8 heads over 4 of keys and values, vocabulary {WIDTH["vocab_size"]:,}; for CoDA an encoder of that size. {ROWS} rows of {TOKENS}
tokens, float32.

State is what a method adds beside the base: values, gradients and AdamW's two moments, 4 bytes each, so 16 a number, and 4 for
every index of a sparse selection. Activations are what one forward pass keeps for its backward pass.

"""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    out: Path = parser.parse_args().out
    rows = [measured(kind) for kind in CHANGES]
    full = held(everything())
    made = stamp("memory")
    report = {"harness": made, "methods": rows, "full_activations": full}
    (out / "memory.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "memory.md").write_text(f"{HEADER}{render(rows, full)}\n\n{line(made)}")
    print(render(rows, full))


if __name__ == "__main__":
    main()
