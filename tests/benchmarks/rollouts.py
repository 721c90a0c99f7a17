"""Sampling answers of mixed lengths on the embedded model: padded batches, continuous refill, refill in fixed shapes, in turn.

    python tests/benchmarks/rollouts.py [--rounds 7] [--prompts 48] [--answers 4] [--new 96] [--slots 16 64]

All sides draw the very same answers (asserted). `padded` is the model's own `generate` on batches that run until their longest
answer has ended, `refill` the decoding with slots (`runtime.decoding=continuous`), `static` the same in tensors of fixed shape,
which a GPU can replay. Rates are tokens of answers per CPU-second of this process; a ratio is the median over rounds of the
ratios of neighbours. Passes and rows of decoding are counted once and do not depend on the machine. Results go to
tests/benchmarks/results/rollouts.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from llmrecipe.core.device_profile import profile_of, use
from llmrecipe.data.tokenize.chat_templates import prompt_ids
from llmrecipe.engine.generation import generate
from llmrecipe.engine.sampling import Sampling
from llmrecipe.evaluation.evaluate_model import open_subject
from llmrecipe.models import kv_cache

sys.path.insert(0, str(Path(__file__).resolve().parent))

from stamp import line, machine_line, stamp

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
DATA = ROOT / "llmrecipe" / "assets" / "data"
MIXED = ("stories", "sft", "prompts", "sums")
"""Packaged rows whose answers have very different lengths: stories to be continued, sentences, single numbers."""
FRESH = kv_cache.fresh
SIDES = ("padded", "refill", "static")


def prompts_of(name: str, tokenizer: Any, count: int) -> list[list[int]]:
    """Token ids of some prompts; of a story, its beginning."""
    lines = (DATA / name / "train.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    rows = [json.loads(line) for line in lines]
    if name == "stories":
        return [tokenizer(row["text"][:30], add_special_tokens=False)["input_ids"] for row in rows]
    return [prompt_ids(tokenizer, row["prompt"]) for row in rows]


def answers_of(side: str, model: Any, tokenizer: Any, prompts: list[list[int]], how: Sampling) -> tuple[list[list[int]], float]:
    """Answers, and the CPU-seconds they took."""
    kv_cache.fresh = (lambda model: None) if side == "padded" else FRESH
    way = "static" if side == "static" else "continuous"
    use(dataclasses.replace(profile_of("cpu"), decided=dataclasses.replace(profile_of("cpu").decided, decoding=way)))
    began = time.process_time()
    answers = generate(model, tokenizer, prompts, how)
    return answers, time.process_time() - began


def measured(model: Any, tokenizer: Any, prompts: list[list[int]], how: Sampling, rounds: int) -> list[str]:
    """Table lines for one number of slots."""
    passes: list[tuple[int, int]] = []
    handle = model.register_forward_pre_hook(lambda _, a, k: passes.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    counted, found = {}, {}
    for side in SIDES:
        # Each way is tried on a few tokens before it is taken for the first time.
        answers_of(side, model, tokenizer, prompts[:1], how)
        passes.clear()
        found[side], _ = answers_of(side, model, tokenizer, prompts, how)
        counted[side] = (len(passes), sum(r for r, t in passes if t == 1))
    handle.remove()
    assert found["padded"] == found["refill"] == found["static"]
    lengths = sorted(len(a) for a in found["refill"])
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, seen in rates.items():
            seen.append(sum(lengths) / answers_of(side, model, tokenizer, prompts, how)[1])
    lines = [
        "",
        f"{len(prompts)} answers, {how.batch} at once; lengths: shortest {lengths[0]}, median {lengths[len(lengths) // 2]}, "
        f"mean {sum(lengths) / len(lengths):.1f}, longest {lengths[-1]}.",
        "",
        "| | passes | rows decoded | tokens/CPU-second (median) | lowest | highest |",
        "|---|---|---|---|---|---|",
    ]
    for side, seen in rates.items():
        middle, (count, rows) = statistics.median(seen), counted[side]
        lines.append(f"| {side} | {count} | {rows} | {middle:.0f} | {min(seen):.0f} | {max(seen):.0f} |")
    for own, other in (("refill", "padded"), ("static", "refill")):
        ratio = statistics.median(a / b for a, b in zip(rates[own], rates[other], strict=True))
        lines += ["", f"{own} / {other}, median of {rounds} neighbouring pairs: {ratio:.2f}x"]
    return lines


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="padded batches against continuous refill")
    for name, value in (("rounds", 7), ("prompts", 48), ("answers", 4), ("new", 96)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 64])
    options = parser.parse_args()
    torch.set_num_threads(1)
    subject = open_subject("tiny", [])
    model, tokenizer = subject.roles.model, subject.loaded.tokenizer
    count = options.prompts // len(MIXED)
    mixed = zip(*(prompts_of(name, tokenizer, count) for name in MIXED), strict=True)
    prompts = [prompt for each in mixed for prompt in each for _ in range(options.answers)]
    lines = [
        f"Embedded model, one thread, {options.answers} answers to a prompt, at most {options.new} tokens, same on all sides.",
        "",
        "`static` decodes rows that have no answer and attends to columns that are dead, so that every step has one shape. A "
        "CPU gains nothing by that; what a GPU gains by replaying such a step is measured by `tests/benchmarks/gpu.py`.",
    ]
    for slots in options.slots:
        how = Sampling(options.new, temperature=1.0, batch=slots, seed=0)
        lines += measured(model, tokenizer, prompts, how, options.rounds)
    text = "\n".join(lines)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "rollouts.md").write_text(f"{text}\n\n{machine_line()}\n{line(stamp('rollouts'))}", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
