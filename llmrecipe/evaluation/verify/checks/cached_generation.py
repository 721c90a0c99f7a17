"""What a model writes with its cache, and what it thinks of it when it reads it."""

from __future__ import annotations

from typing import ClassVar

import torch

from llmrecipe.core.registry import register
from llmrecipe.data.collate import Sequence, pad
from llmrecipe.engine.generation import generate, prompt_and_references, recorded_answers
from llmrecipe.engine.sampling import Sampling
from llmrecipe.evaluation.verify.bench import Bench, largest
from llmrecipe.evaluation.verify.verification import Measured, NotApplicable, Verification

NEW = 8
"""Tokens of an answer to a probe prompt."""


@register
class CachedGeneration(Verification):
    """log p of every generated token under the cached decoder = log p under the policy that reads the whole text.

    Objectives that sample give their own answers, so a sampler with other weights than the policy's shows.
    """

    order: ClassVar[int] = 50

    def measure(self, bench: Bench) -> Measured:
        """Compare the log-probabilities of both."""
        run = bench.run
        if run.objective.model_head() != "causal" or run.roles.engine.is_pair_model or not run.model.can_generate():
            raise NotApplicable(f"a model with a {run.objective.model_head()} head does not continue its own text")
        with bench.probing() as run, torch.no_grad(), recorded_answers() as answers:
            if run.objective.samples:
                bench.micros(run)
            else:
                rows = bench.rows()
                prompts = [list(prompt_and_references(row, run.tokenizer)[0]) or row["ids"][:1] for row in rows]
                tasks = [row.get("task", 0) for row in rows] if any("task" in row for row in rows) else None
                generate(run.model, run.tokenizer, prompts, Sampling(max_new_tokens=NEW), tasks=tasks)
        if not answers:
            raise NotApplicable("this model decodes by Transformers' own generate, whose probabilities are not seen")
        with bench.probing() as run, torch.no_grad():
            worst, where = 0.0, ""
            for answer in answers:
                ids = [*answer.prompt, *answer.tokens]
                trained = [0] * len(answer.prompt) + [1] * len(answer.tokens)
                batch = pad([Sequence(ids, trained, prompt=len(answer.prompt), task=answer.task or 0)], run.roles.pad_id)
                read = run.roles.engine(batch.to(run.roles.device), temperature=answer.temperature)["logprobs"].cpu()
                apart, _ = largest({"t": read}, {"t": answer.logprobs})
                if not apart <= worst:
                    worst, where = apart, f"an answer of {len(answer.tokens)} tokens: the sampler's weights or cache differ"
        whose = "the objective's sampler" if bench.run.objective.samples else "cached generation"
        return Measured(f"log-probabilities of {whose} = of the policy reading the text", worst, bench.bound, where)
