"""The methods that PEFT has too, side by side on one base: time of a step and bytes kept for the backward pass.

python -m tests.benchmarks.peft_methods [--rounds N] [--out FOLDER]

Both sides run the same Transformers model on the same rows in one process, taking turns, one thread. A step is a forward pass
to the logits, a mean of squares and a backward pass: what the adapters cost, without data, optimizer or loss of either library.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmrecipe.training.memory_estimate import retained_bytes, saved_bytes
from tests.benchmarks.memory import ROWS, TOKENS, WIDTH, model
from tests.benchmarks.stamp import line, machine, machine_line, stamp
from tests.methods.kinds import put, wrapper_of

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL = {"target": "all-linear", "r": 8, "alpha": 16.0}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": EVERY}
QUANTIZED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
"""Our kind of quantized base -> the options of Transformers' loading that make the same one."""
CASES: dict[str, tuple[dict[str, dict[str, Any]], str, dict[str, Any]]] = {
    "lora": ({"lora": ALL}, "LoraConfig", LORA),
    "lora, dropout 0.1": ({"lora": {**ALL, "dropout": 0.1}}, "LoraConfig", {**LORA, "lora_dropout": 0.1}),
    "dora": ({"dora": ALL}, "LoraConfig", {**LORA, "use_dora": True}),
    "lora_fa": ({"lora_fa": ALL}, "LoraConfig", LORA),
    "vera": ({"vera": {"target": "all-linear", "r": 64}}, "VeraConfig", {"r": 64, "target_modules": EVERY}),
    "nf4 + lora": ({"nf4": {}, "lora": ALL}, "LoraConfig", LORA),
    "int8 + lora": ({"int8": {}, "lora": ALL}, "LoraConfig", LORA),
    "adalora": (
        {"adalora": {"target": "all-linear", "init_r": 8, "target_r": 4, "total_step": 100}},
        "AdaLoraConfig",
        {"init_r": 8, "target_r": 4, "total_step": 100, "target_modules": EVERY},
    ),
    "ia3": (
        {"ia3": {}},
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "prefix_tuning": (
        {"prefix_tuning": {"num_virtual_tokens": 30, "hidden": 512}},
        "PrefixTuningConfig",
        {"num_virtual_tokens": 30, "prefix_projection": True, "encoder_hidden_size": 512, "task_type": "CAUSAL_LM"},
    ),
    "p_tuning_v2": (
        {"p_tuning_v2": {"num_virtual_tokens": 30, "dropout": 0.0}},
        "PrefixTuningConfig",
        {"num_virtual_tokens": 30, "prefix_projection": False, "task_type": "CAUSAL_LM"},
    ),
    "prompt_tuning": (
        {"prompt_tuning": {"num_virtual_tokens": 20}},
        "PromptTuningConfig",
        {"num_virtual_tokens": 20, "task_type": "CAUSAL_LM"},
    ),
}
"""method -> (our kinds with their options, PEFT's config, its options)."""


def ours(kinds: dict[str, dict[str, Any]]) -> nn.Module:
    """The base under our wrappers."""
    made = put(model("lora"), *(wrapper_of(kind, **options) for kind, options in kinds.items()))
    made.stack.before_step(made.model, 0)
    return made.model.train()


def theirs(kinds: dict[str, dict[str, Any]], config: str, options: dict[str, Any]) -> nn.Module:
    """The base under PEFT; its optimizer for LoRA-FA freezes what that method freezes."""
    import peft
    from peft.optimizers import create_lorafa_optimizer

    base = next((loaded(QUANTIZED[kind]) for kind in kinds if kind in QUANTIZED), None) or model("lora")
    made = peft.get_peft_model(base, getattr(peft, config)(**options)).train()
    if "lora_fa" in kinds:
        create_lorafa_optimizer(made, r=options["r"], lora_alpha=options["lora_alpha"], lr=1e-3)
    return made


def loaded(quantization: dict[str, Any]) -> nn.Module:
    """The base, quantized by bitsandbytes as Transformers loads it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as folder:
        model("lora").save_pretrained(folder)
        config = BitsAndBytesConfig(**quantization)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def loss(subject: nn.Module, ids: Tensor) -> Tensor:
    """Mean of squares of the logits."""
    return subject(input_ids=ids, use_cache=False).logits.float().square().mean()


def seconds(action: Callable[[], None]) -> float:
    """Of one call, in time of this process on the CPU."""
    start = time.process_time()
    action()
    return time.process_time() - start


def step(subject: nn.Module, ids: Tensor) -> None:
    """Forward and backward."""
    loss(subject, ids).backward()
    subject.zero_grad(set_to_none=True)


def kept(subject: nn.Module, ids: Tensor) -> int:
    """Bytes a forward pass keeps, weights left out."""
    there = list(chain(subject.parameters(), subject.buffers()))
    end, saved = saved_bytes(lambda: loss(subject, ids), there)
    return max(saved, retained_bytes(end, there))


def row(name: str, rounds: int, ids: Tensor) -> dict[str, Any]:
    """Ratios of one method: ours over theirs."""
    kinds, config, words = CASES[name]
    pair = (ours(kinds), theirs(kinds, config, words))
    times: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        for side in (0, 1) if turn % 2 else (1, 0):
            took = seconds(lambda side=side: step(pair[side], ids))
            times[side] += [took] if turn else []
    bytes_ = [kept(subject, ids) for subject in pair]
    middle = [statistics.median(t) for t in times]
    ratios = [a / b for a, b in zip(*times, strict=True)]
    return {
        "method": name,
        "ours_s": middle[0],
        "peft_s": middle[1],
        "time": statistics.median(ratios),
        "spread": statistics.stdev(ratios),
        "ours_mb": bytes_[0] / 1e6,
        "peft_mb": bytes_[1] / 1e6,
        "memory": bytes_[0] / bytes_[1],
    }


def render(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    names = ("method", "step s, ours", "PEFT", "time ratio", "kept MB, ours", "PEFT", "memory ratio")
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for r in rows:
        cells = [r["method"], f"{r['ours_s']:.3f}", f"{r['peft_s']:.3f}", f"{r['time']:.2f} ± {r['spread']:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{r['ours_mb']:.1f}", f"{r['peft_mb']:.1f}", f"{r['memory']:.2f}"]) + " |")
    return "\n".join(lines)


HEADER = f"""# Methods that PEFT has too

Written by `python -m tests.benchmarks.peft_methods`: one decoder (width {WIDTH["hidden_size"]},
{WIDTH["num_hidden_layers"]} layers) and {ROWS} rows of {TOKENS} tokens under both libraries in turns, one thread, float32;
forward to the logits and backward to what the method trains. Times are CPU time, medians over {{rounds}} rounds; ratios are
ours over PEFT's with their standard deviation; bytes are those kept for the backward pass, each storage once. LoRA in all
its forms and AdaLoRA stand on all linear layers, rank 8, VeRA with rank 64. Quantized bases are bitsandbytes' layers on both
sides.

"""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ids = torch.randint(3, WIDTH["vocab_size"], (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    rows = [row(name, args.rounds, ids) for name in args.cases]
    made, where = stamp("peft_methods"), machine(PACKAGES)
    report = {"harness": made, "machine": where, "methods": rows}
    (args.out / "peft_methods.json").write_text(json.dumps(report, indent=1) + "\n")
    text = f"{HEADER.format(rounds=args.rounds)}{machine_line(where)}\n{render(rows)}\n\n{line(made)}"
    (args.out / "peft_methods.md").write_text(text)
    print(render(rows))


if __name__ == "__main__":
    main()
