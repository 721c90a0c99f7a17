"""A text metric of generated answers as a loss, which has no gradient."""

from __future__ import annotations

from typing import Any

import torch

from llmrecipe.data.collate import Batch
from llmrecipe.engine.answer_ends import answer_ends
from llmrecipe.engine.generation import generate, prompt_and_references
from llmrecipe.engine.role_models import Roles
from llmrecipe.engine.sampling import Sampling
from llmrecipe.objectives.base import Loss
from llmrecipe.objectives.text_metric import TextMetric


def with_answers(batch: Batch, rows: list[dict[str, Any]], roles: Roles) -> Batch:
    """Return a batch that knows what is to be answered: the prompts of its R rows, and as texts their references.

    `extra` has `answered`, the token ids of all prompts in one flat tensor, `answered_lengths` (R,), and `answered_tasks` (R,)
    where rows have tasks.
    """
    pairs = [prompt_and_references(row, roles.tokenizer) for row in rows]
    extra = {
        "answered": torch.tensor([token for prompt, _ in pairs for token in prompt], dtype=torch.long),
        "answered_lengths": torch.tensor([len(prompt) for prompt, _ in pairs], dtype=torch.long),
    }
    if rows and "task" in rows[0]:
        extra["answered_tasks"] = torch.tensor([int(row["task"]) for row in rows], dtype=torch.long)
    return batch.with_extra(**extra).with_texts(tuple(tuple(references) for _, references in pairs))


def answered_rows(batch: Batch) -> int:
    """Return R, the number of rows to be answered."""
    return len(batch.texts)


def answer_loss(batch: Batch, roles: Roles, metric: TextMetric, name: str, max_new_tokens: int) -> Loss:
    """Return sum_i |best - m_i| over the greedy answers to the rows of a batch, m_i the metric and best its better bound.

    Of several references of a row the one with the best score counts.

    Args:
        name: of the metric, under which its mean is reported.
    """
    extra = batch.here.extra
    prompts = [part.tolist() for part in extra["answered"].split(extra["answered_lengths"].tolist())]
    tasks = extra["answered_tasks"].tolist() if "answered_tasks" in extra else None
    sampling = Sampling(max_new_tokens, batch=max(1, len(prompts)))
    answers = generate(roles.model, roles.tokenizer, prompts, sampling, tasks=tasks)
    ends = answer_ends(roles.model, roles.tokenizer, sampling)
    texts = zip(answers, batch.texts, strict=True)
    best = metric.bounds[1 if metric.direction == "max" else 0]
    scores = torch.tensor([metric.best(ends.text(ids), references) for ids, references in texts], dtype=torch.float64)
    return Loss((best - scores).abs().sum(), {name: (scores.sum(), float(len(prompts)))})
