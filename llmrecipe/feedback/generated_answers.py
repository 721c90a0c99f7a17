"""Generated answers of a split: scored by text metrics, and shown as samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmrecipe.core import registry
from llmrecipe.engine.generation import decode_ids, generate, prompt_and_reference
from llmrecipe.engine.role_models import Roles
from llmrecipe.engine.sampling import Sampling
from llmrecipe.feedback.metric import Metric

if TYPE_CHECKING:
    from llmrecipe.data.prepare import Rows


def answer_rows(data: Rows, roles: Roles, indices: list[int], sampling: Sampling) -> list[dict[str, str]]:
    """Generate answers and return prompt, reference and generated answer of some rows."""
    rows = [data[i] for i in indices]
    pairs = [prompt_and_reference(row, roles.tokenizer) for row in rows]
    tasks = [row["task"] for row in rows] if getattr(data, "tasks", None) is not None else None
    answers = generate(roles.model, roles.tokenizer, [p for p, _ in pairs], sampling, tasks=tasks)
    return [
        {"prompt": decode_ids(roles.tokenizer, prompt), "reference": reference, "answer": decode_ids(roles.tokenizer, answer)}
        for (prompt, reference), answer in zip(pairs, answers, strict=True)
    ]


def score_answers(rows: list[dict[str, str]], names: list[str]) -> dict[str, Scored]:
    """Score answered rows by each named metric.

    Raises:
        RecipeError: a metric is unknown.
    """
    found = {}
    for name in names:
        metric = registry.load_class("metric", name, "eval.metrics")()
        found[name] = Scored(metric, [metric.statistics(r["answer"], r["reference"]) for r in rows])
    return found


@dataclass(frozen=True)
class Scored:
    """One metric of some rows."""

    metric: Metric
    rows: list[list[float]]
    """The statistics of each row."""

    @property
    def value(self) -> float:
        """Return the score of all rows together; 0 where there are none."""
        return self.metric.total([sum(column) for column in zip(*self.rows, strict=True)]) if self.rows else 0.0
