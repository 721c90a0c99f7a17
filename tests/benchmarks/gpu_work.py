"""What a cell of `gpu.py` runs on: random models of a shape, rows of words that are tokens, and the meter both sides share."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.gpu_flops import SHAPES
from tests.benchmarks.workload import Words, build_tokenizer, write_rows

SEED = 0
LORA = {"r": 16, "alpha": 32}
LONG = 8
"""Tokens of a long row in those of a full one."""
SAMPLED = ("grpo", "generate")
"""Tasks whose rows are prompts."""
WARM = 2
"""Steps that no rate counts."""
DETERMINISTIC = "runtime.deterministic=true"
"""Word of cells in which the device is compared with itself."""


@dataclass(frozen=True)
class Size:
    """How much a cell does."""

    longest: int
    """Tokens of a full row, and the most of a row of real lengths."""
    median: int
    """Of real lengths, prompt and answer together."""
    prompt: int
    """Tokens of a prompt that answers are sampled to."""
    new: int
    """Tokens of a sampled answer."""
    answers: int
    """To each prompt."""
    steps: int
    full_rows: int
    """Rows a step where they are full."""
    real_rows: int
    """Rows a step of real lengths; pairs are half as many."""
    prompts: int
    """Prompts a step."""
    micro: int
    """Tokens that the peers put through the model at once, counted at full length."""


SIZES = {
    "whole": Size(4096, 320, 256, 256, 8, 10, 4, 32, 8, 8192),
    "dry": Size(48, 16, 6, 4, 2, 3, 2, 4, 2, 96),
}


@dataclass(frozen=True)
class Cell:
    """One thing to be measured, by one side, in one process."""

    side: str
    """product, transformers, trl or trl_best."""
    task: str
    """sft, dpo, grpo, or generate (see `gpu_decoding`)."""
    method: str
    """lora, qlora or full."""
    shape: str
    lengths: str = "full"
    """full (every row the longest), real (log-normal), long (a row a step, `LONG` times the longest), prompts."""
    kind: str = "speed"
    """speed, profile, or equal (losses on the CPU and on the device; answers of two ways of decoding)."""
    dtype: str = "bfloat16"
    words: str = ""
    """Further words of the recipe, of the product alone."""

    @property
    def name(self) -> str:
        """Words that say which."""
        return " ".join(str(v) for v in asdict(self).values()).strip()


# --- models and rows --------------------------------------------------------------------------------------------------


def build_model(folder: Path, shape: str, device: str, dtype: str = "bfloat16") -> Path:
    """Write random weights, config and word tokenizer as a Transformers folder, once; drawn on the device."""
    if (folder / "whole").exists():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    found = SHAPES[shape]
    torch.manual_seed(SEED)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(found.family, **found.config()), dtype=getattr(torch, dtype)
        )
    model.save_pretrained(folder)
    build_tokenizer(found.vocabulary).save_pretrained(folder)
    (folder / "whole").touch()
    return folder


def rows_of(cell: Cell, size: Size) -> list[dict[str, str]]:
    """Rows of all steps: a prompt of one word before full rows, 3:2 in real ones; a pair's answers differ by up to 40 %."""
    draw = Words(SEED)
    pairs = cell.task == "dpo"
    found = []
    for _ in range(size.steps * rows_per_step(cell, size)):
        topic = draw.topic()
        if cell.task in SAMPLED:
            found.append({"prompt": draw.text(topic, size.prompt)})
            continue
        prompt, answer = _lengths(cell, size, draw)
        row = {"prompt": draw.text(topic, prompt)}
        if not pairs:
            found.append({**row, "completion": " " + draw.text(topic, answer)})
            continue
        other = answer if cell.lengths == "full" else max(2, round(answer * draw.random.uniform(0.6, 1.4)))
        other = min(other, longest(cell, size) - 1 - prompt)
        found.append({**row, "chosen": " " + draw.text(topic, answer), "rejected": " " + draw.text(topic, other)})
    return found


def rows_per_step(cell: Cell, size: Size) -> int:
    """Rows (or pairs, or prompts) in an optimizer step; a pair counts as two rows."""
    if cell.task in SAMPLED:
        return size.prompts
    if cell.lengths == "long":
        return 1
    rows = size.full_rows if cell.lengths == "full" else size.real_rows
    return max(1, rows // 2) if cell.task == "dpo" else rows


def rows_at_once(cell: Cell, size: Size) -> int:
    """Rows (or pairs, or answers) that a peer puts through the model at once: a divisor of those of a step."""
    rows = rows_per_step(cell, size) * (size.answers if cell.task in SAMPLED else 1)
    length = {"real": size.longest // 2, "prompts": size.prompt + size.new}.get(cell.lengths, longest(cell, size))
    most = max(1, size.micro // (length * (2 if cell.task == "dpo" else 1)))
    return next(n for n in range(min(most, rows), 0, -1) if rows % n == 0)


def longest(cell: Cell, size: Size) -> int:
    """The most tokens of a row."""
    return size.longest * (LONG if cell.lengths == "long" else 1)


def _lengths(cell: Cell, size: Size, draw: Words) -> tuple[int, int]:
    """(prompt, answer) tokens; the end token comes on top."""
    if cell.lengths in ("full", "long"):
        # Pairs share a prompt as they do in real rows; other rows are all answer.
        most = longest(cell, size)
        prompt = most // 2 if cell.task == "dpo" else 1
        return prompt, most - prompt - 1
    length = int(np.clip(round(float(np.exp(draw.random.normal(np.log(size.median), 0.9)))), 8, size.longest // 2))
    return draw.split(length - 1)


def sequence_lengths(cell: Cell, rows: list[dict[str, str]], size: Size) -> list[int]:
    """Tokens of every sequence as a trainer sees it: each answer with its own copy of the prompt and its end token."""
    if cell.task in SAMPLED:
        return [size.prompt + size.new] * (len(rows) * size.answers)
    answers = ("completion", "chosen", "rejected")
    return [len(r["prompt"].split()) + len(r[a].split()) + 1 for r in rows for a in answers if a in r]


def write_cell_rows(cell: Cell, size: Size, path: Path) -> list[int]:
    """Write the rows; returns the lengths of their sequences."""
    rows = rows_of(cell, size)
    write_rows(path, rows)
    return sequence_lengths(cell, rows, size)


# --- the meter --------------------------------------------------------------------------------------------------------


class Meter:
    """Wall times at the ends of steps, losses, peak memory, and a profile of the steps after the warm ones if asked for.

    Args:
        began: `time.time()` when the process was started.
    """

    def __init__(self, began: float, device: str, profile: bool = False):
        self.began, self.device = began, device
        self.ends: list[float] = []
        self.tokens: list[int] = []
        self.losses: list[float] = []
        self.shares: list[dict[str, Any]] = []
        self._profile = self._profiler() if profile else None

    def _profiler(self) -> Any:
        from torch.profiler import ProfilerActivity, profile

        return profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device == "cuda" else [])])

    def step(self, loss: float, tokens: int) -> None:
        """A step has ended; `tokens` counts from the start, in the side's own way."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        self.ends.append(time.time() - self.began)
        self.losses.append(float(loss))
        self.tokens.append(tokens)
        if self._profile is not None and len(self.ends) == WARM:
            self._profile.start()
        elif self._profile is not None and len(self.ends) == WARM + 1:
            self._profile.stop()
            self.shares = kernel_shares(self._profile.key_averages(), self.device)

    def report(self, lengths: list[int], flops: Callable[[list[int]], int], own: bool = False) -> dict[str, Any]:
        """What was measured.

        Args:
            lengths: of every sequence of all steps.
            flops: of sequences by their lengths.
            own: whether the side counts the sequences' tokens one by one, also where it reads some of them twice; else the
                sequences were read once, and its count says only which share of them a step was.

        Raises:
            RuntimeError: too few steps for a rate.
        """
        if len(self.ends) <= WARM:
            raise RuntimeError(f"{len(self.ends)} steps ended; a rate needs more than {WARM}")
        read = self.tokens[-1] if own else sum(lengths)
        rate = read * (1 - self.tokens[WARM - 1] / self.tokens[-1]) / (self.ends[-1] - self.ends[WARM - 1])
        steps = np.diff(self.ends[WARM - 1 :])
        return {
            "tokens_per_s": rate,
            "tflops_per_s": rate * flops(lengths) / sum(lengths) / 1e12,
            "tokens": read,
            "first_step_s": self.ends[0],
            "warm_s": self.ends[WARM - 1],
            "step_s": float(np.median(steps)),
            "peak_mb": self.peak_mb(),
            "losses": self.losses,
            **({"kernels": self.shares} if self.shares else {}),
        }

    def peak_mb(self) -> float:
        """Most that tensors held on the device, or the process on a CPU."""
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


GROUPS = (
    ("attention", ("flash", "fmha", "attention", "sdpa", "softmax")),
    ("matrix products", ("gemm", "cutlass", "cublas", "nvjet", "aten::mm", "addmm", "bmm", "matmul", "linear")),
    ("quantization", ("quantize", "4bit", "8bit")),
    ("optimizer", ("adam", "multi_tensor", "foreach")),
    ("copies", ("memcpy", "memset", "copy", "cat")),
    ("norms and reductions", ("norm", "reduce", "sum", "mean")),
    ("indexing", ("index", "gather", "scatter", "embedding")),
    ("element by element", ("elementwise", "vectorized", "triton", "mul", "add", "sigmoid", "silu")),
)


def group_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    lowered = kernel.lower()
    return next((group for group, words in GROUPS if any(w in lowered for w in words)), "other")


def kernel_shares(averages: Any, device: str) -> list[dict[str, Any]]:
    """Kernels by their share of the device's time (of operations' own time on a CPU), largest first."""
    # Operations carry the time of the kernels they start as well; on a GPU only the kernels themselves count.
    events = [e for e in averages if device != "cuda" or "CUDA" in str(e.device_type)]
    times = [(e.key, e.self_device_time_total if device == "cuda" else e.self_cpu_time_total, e.count) for e in events]
    whole = sum(t for _, t, _ in times) or 1.0
    return [
        {"kernel": key, "group": group_of(key), "share": t / whole, "ms": t / 1e3, "calls": count}
        for key, t, count in sorted(times, key=lambda entry: -entry[1])
        if t > 0
    ]


def write_json(path: Path, report: Any) -> None:
    """Write whole or not at all."""
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)
