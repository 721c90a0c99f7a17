"""Answers sampled in each way of `runtime.decoding`, for `gpu.py`: the same answers first, then tokens a second.

`static` is compared with `continuous`, and `graphs` with `static`. Answers are drawn from a random model under a LoRA; so many
tokens end an answer that half of the longest length is usual, and half of the answers wait until others have ended.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu_work import LORA, SEED, Cell, Meter, Size, rows_of

KEY = "runtime.decoding"
WAYS = ("continuous", "static", "graphs")
"""Each is compared with the one before it."""
TOLERANCE = 1e-4
"""Largest difference of a log-probability in float32."""


def words(way: str) -> str:
    """The key that names a way."""
    return f"{KEY}={way}"


def way_of(cell: Cell) -> str | None:
    """The way that a cell names."""
    return next((word.partition("=")[2] for word in cell.words.split() if word.startswith(f"{KEY}=")), None)


class Sampler:
    """A model, its prompts and how answers to them are drawn."""

    def __init__(self, spec: dict[str, Any], cell: Cell, size: Size):
        import torch

        from llmrecipe.engine.sampling import Sampling
        from llmrecipe.evaluation.evaluate_model import open_subject
        from llmrecipe.methods._base.stack import Stack
        from llmrecipe.methods.reparameterized.lora import Lora
        from tests.benchmarks.gpu_cell import TARGET

        self.device = spec["device"]
        subject = open_subject(spec["model"], [f"runtime.device={self.device}", f"model.dtype={cell.dtype}"])
        self.model, self.tokenizer = subject.roles.model, subject.loaded.tokenizer
        stack = Stack([Lora(name="lora", target=TARGET, **LORA)])
        stack.attach(self.model)
        torch.manual_seed(SEED)
        for parameter in self.model.parameters():
            if parameter.requires_grad and not parameter.any():
                torch.nn.init.normal_(parameter, std=1e-3)
        self.model.to(self.device)
        vocabulary = self.model.config.vocab_size
        self.model.generation_config.eos_token_id = list(range(4, vocabulary, max(2, size.new // 2)))
        texts = [row["prompt"] for row in rows_of(cell, size)]
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        self.prompts = [prompt for prompt in ids for _ in range(size.answers)]
        self.per_call = size.prompts * size.answers
        self.sampling = Sampling(size.new, 1.0, batch=max(1, self.per_call // 2), seed=SEED)

    def draw(self, way: str, call: int = 0) -> list[tuple[list[int], Any]]:
        """(tokens, log-probabilities) of the answers to the prompts of a call."""
        from llmrecipe.core.device_profile import profile_of, use
        from llmrecipe.engine.generation import generate_scored

        use(replace(profile_of(self.device), chosen={"decoding": way}))
        prompts = self.prompts[call * self.per_call : (call + 1) * self.per_call]
        return [(a.tokens, a.logprobs) for a in generate_scored(self.model, self.tokenizer, prompts, self.sampling)]


def differences(own: list[tuple[list[int], Any]], wanted: list[tuple[list[int], Any]]) -> dict[str, Any]:
    """Share of answers that are the same, and the largest difference of their log-probabilities up to where they part."""
    largest = 0.0
    for (tokens, logprobs), (right, others) in zip(own, wanted, strict=True):
        alike = next((i for i, (a, b) in enumerate(zip(tokens, right, strict=False)) if a != b), min(len(tokens), len(right)))
        largest = max([largest, *(logprobs[:alike] - others[:alike]).abs().tolist()])
    same = sum(a == b for (a, _), (b, _) in zip(own, wanted, strict=True)) / len(own)
    return {"same": same, "difference": largest, "tolerance": TOLERANCE, "equal": same == 1.0 and largest <= TOLERANCE}


def measure(spec: dict[str, Any], cell: Cell, size: Size) -> dict[str, Any]:
    """Compare a way with the one before it, or time it."""
    way = way_of(cell)
    assert way is not None, "the cell names a way"
    Path(spec["out"]).mkdir(parents=True, exist_ok=True)
    sampler = Sampler(spec, cell, size)
    if cell.kind == "equal":
        return differences(sampler.draw(way), sampler.draw(WAYS[WAYS.index(way) - 1]))
    meter, tokens, seconds = Meter(spec["began"], spec["device"]), 0, []
    for call in range(size.steps):
        began = time.time()
        tokens += sum(len(answer) for answer, _ in sampler.draw(way, call))
        meter.step(0.0, tokens)
        seconds.append(time.time() - began)
    found = meter.report([1], lambda lengths: 0, own=True)
    del found["tflops_per_s"], found["losses"]
    return {**found, "calls_s": seconds, "settings": {}}


def cells(tiny: tuple[str, ...], shapes: tuple[str, ...]) -> list[Cell]:
    """Every way on models of some shapes, what is compared first."""
    equal = [Cell("product", "generate", "lora", t, "prompts", "equal", "float32", words(w)) for t in tiny for w in WAYS[1:]]
    return equal + [Cell("product", "generate", "lora", s, "prompts", words=words(w)) for s in shapes for w in WAYS]


def gains(done: list[dict[str, Any]]) -> list[str]:
    """One line for each way that is not the first: its rate over that of `continuous` on the same model."""
    own = [r for r in done if r["cell"]["kind"] == "speed" and r["cell"]["side"] == "product"]
    rates = {Cell(**r["cell"]): r["tokens_per_s"] for r in own}
    lines = []
    for cell, rate in rates.items():
        way = way_of(cell)
        first = rates.get(replace(cell, words=words("continuous"))) or rates.get(replace(cell, words=""))
        if way in WAYS[1:] and first is not None:
            lines.append(f"- {replace(cell, words='').name}: {way} {rate / first:.2f} x continuous")
    return lines
