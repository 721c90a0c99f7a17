"""Generated answers of a split: scored by text metrics, and shown as samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llmrecipe.core import registry
from llmrecipe.core.forward_context import current
from llmrecipe.core.time_limit import compiled, matches
from llmrecipe.engine.answer_ends import answer_ends
from llmrecipe.engine.generation import decode_ids, generate, prompt_and_references
from llmrecipe.engine.role_models import Roles
from llmrecipe.engine.sampling import Sampling
from llmrecipe.feedback.metric import Metric

if TYPE_CHECKING:
    from llmrecipe.data.prepare import Rows


Examples = tuple[Tensor, Tensor]
"""Token ids and mask, (K, T') each, of the texts that K adapters are made from."""


def answer_rows(
    data: Rows, roles: Roles, indices: list[int], sampling: Sampling, examples: Callable[[list[int]], Examples] | None = None
) -> list[dict[str, Any]]:
    """Generate answers and return prompt, references, generated answer and task (None where rows have none) of some rows.

    Args:
        examples: returns the texts from which the adapter of each of some rows is made (see `Objective.examples_of`).
    """
    if examples is None:
        return _answered(data, roles, indices, sampling)
    # The adapters of one batch of answers are in memory at a time.
    parts = [indices[i : i + sampling.batch] for i in range(0, len(indices), sampling.batch)]
    return [row for part in parts for row in _answered(data, roles, part, sampling, examples(part))]


def _answered(
    data: Rows, roles: Roles, indices: list[int], sampling: Sampling, examples: Examples | None = None
) -> list[dict[str, Any]]:
    rows = [data[i] for i in indices]
    pairs = [prompt_and_references(row, roles.tokenizer) for row in rows]
    tasks = [int(row["task"]) for row in rows] if getattr(data, "tasks", None) is not None else None
    context, adapters = current(), tasks
    if examples is not None:
        # What a hypermodel writes serves every token of these answers.
        context, adapters = replace(context, examples=examples, computed={}), list(range(len(rows)))
    ends = answer_ends(roles.model, roles.tokenizer, sampling)
    answers = generate(roles.model, roles.tokenizer, [p for p, _ in pairs], sampling, context, adapters)
    return [
        {
            "prompt": decode_ids(roles.tokenizer, prompt),
            "references": references,
            "answer": ends.text(answer),
            "task": None if tasks is None else tasks[i],
        }
        for i, ((prompt, references), answer) in enumerate(zip(pairs, answers, strict=True))
    ]


def score_answers(rows: list[dict[str, Any]], names: list[str], extract: str | None = None) -> dict[str, Scored]:
    """Score answered rows by each named metric.

    Args:
        extract: regular expression of what is compared (`eval.extract`); a reference without a match is compared as it is.

    Raises:
        RecipeError: a metric is unknown.
        RunError: the expression took too long on one text.
    """
    answered = [(row["answer"], row["references"]) for row in rows]
    unread: list[bool] | None = None
    if extract is not None and names:
        read = [last_match(extract, answer) for answer, _ in answered]
        kept = [[text if (own := last_match(extract, text)) is None else own for text in known] for _, known in answered]
        unread = [found is None for found in read]
        answered = [(found or "", known) for found, known in zip(read, kept, strict=True)]
    scored = {}
    for name in names:
        metric = registry.load_class("metric", name, "eval.metrics")()
        own = metric.unread(answered)
        scored[name] = Scored(metric, metric.table(answered), unread if own is None else own)
    return scored


def last_match(pattern: str, text: str) -> str | None:
    """Return the last match of a pattern in a text, or its group where the pattern has one; None where there is none.

    Examples:
        >>> last_match(r"\\b([A-E])\\b", "A or C? The answer is (C)."), last_match("[0-9]+", "no number")
        ('C', None)
    """
    found = matches(compiled(pattern, "eval.extract"), text, "eval.extract")
    return None if not found else found[-1].group(found[-1].re.groups and 1)


@dataclass(frozen=True)
class Scored:
    """One metric of some rows."""

    metric: Metric
    rows: list[list[float]]
    """The statistics of each row."""
    unread: list[bool] | None = None
    """Whether the metric could not read the answer of each row; None where it reads every text."""

    @property
    def invalid_rate(self) -> float | None:
        """Return the share of the answers that could not be read; 0 where there are none, None where every text is read."""
        return None if self.unread is None else sum(self.unread) / max(1, len(self.unread))

    @property
    def value(self) -> float:
        """Return the score of all rows together; 0 where there are none."""
        return self.metric.total([sum(column) for column in zip(*self.rows, strict=True)]) if self.rows else 0.0

    def task_mean(self, tasks: Sequence[int]) -> float:
        """Return the mean over tasks of the score of each task's rows; 0 where there are none.

        Args:
            tasks: of each row.
        """
        found: dict[int, list[list[float]]] = {}
        for task, row in zip(tasks, self.rows, strict=True):
            found.setdefault(task, []).append(row)
        return sum(Scored(self.metric, rows).value for rows in found.values()) / max(1, len(found))
