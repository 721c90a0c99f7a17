"""Evaluation over a whole split."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch

from llmrecipe.core.console import Pace, lasting
from llmrecipe.data.tokenize.row_type import row_type
from llmrecipe.engine.sampling import Sampling
from llmrecipe.feedback.generated_answers import Scored, answer_rows, score_answers
from llmrecipe.feedback.metric import INVALID
from llmrecipe.methods._base.late_values import Largest, MetricSums, Smallest
from llmrecipe.models.random_state import random_state_kept
from llmrecipe.training.intervals import RowScores, all_ends

if TYPE_CHECKING:
    from llmrecipe.data.collate import Batch
    from llmrecipe.data.prepare import Rows
    from llmrecipe.engine.role_models import Roles
    from llmrecipe.objectives.base import Objective
    from llmrecipe.recipe.schema import EvalSection
    from llmrecipe.runtime.processes import Runtime

T = TypeVar("T")


class Samples(Protocol):
    """Where an evaluation shows samples of answers and warnings: the events of a run, or the terminal."""

    def warning(self, message: str, *, once: bool = False) -> None:
        """Report something the user should know; with `once` the first time alone."""

    def sample(self, step: int, prompt: str, answer: str, **facts: object) -> None:
        """Report a generated answer."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation needs."""

    section: EvalSection
    batch_size: int
    objective: Objective
    roles: Roles
    runtime: Runtime
    events: Samples
    step: int = 0
    samples: int = 0
    """How often rows are drawn again for the intervals of the scores; 0 for none."""
    breakdown: dict[str, dict[str, Any]] | None = None
    """Filled with the objective's `breakdown` of the scores, where one is wanted."""
    drawn: dict[str, np.ndarray] | None = None
    """Filled with each score of every sample of rows, (samples,), where they are wanted."""

    @property
    def row_by_row(self) -> bool:
        """Return whether rows are read one at a time: for intervals, where no answers are sampled, which takes batches."""
        return bool(self.samples) and not self.objective.samples


def evaluate(evaluation: Evaluation, data: Rows) -> dict[str, float]:
    """Compute metrics of a split: sums over all its rows and all processes, divided once.

    The result does not depend on the evaluation batch size, padding or the number of processes; random states are put back,
    so a run with evaluations trains exactly as one without. With `samples`, rows are read one at a time, and every score has an
    interval (`training.intervals`).
    """
    objective, roles = evaluation.objective, evaluation.roles
    sums = MetricSums()
    gathered: dict[str, list[torch.Tensor]] = defaultdict(list)
    single: list[dict[str, list[float]]] = []
    with random_state_kept(roles.device), roles.evaluating(), torch.no_grad():
        for part, batch in _batches(evaluation, data):
            with roles.each_pass_once():
                found, tensors = objective.evaluate(batch, roles), objective.collect(batch, roles)
            sums.add(found)
            if evaluation.row_by_row and part:
                plain = {n: e for n, e in found.items() if not isinstance(e, Largest | Smallest)}
                single.append({n: [float(value), float(count)] for n, (value, count) in plain.items()})
            for name, tensor in tensors.items():
                gathered[name].append(tensor)
    metrics = sums.mean(evaluation.runtime)
    joined = {n: _gathered(evaluation, torch.cat(gathered[n])) for n in sorted(gathered)}
    scores = RowScores(evaluation.samples, roles.seed)
    if evaluation.row_by_row:
        rows = _in_order(evaluation.runtime.gather_json(single))
        scores.statistics = {n: np.array([row[n] for row in rows]) for n in metrics if rows and all(n in row for row in rows)}
        scores.tensors = {n: _rows_in_order(t, evaluation.runtime.world) for n, t in joined.items()}
    metrics |= objective.finish_evaluation(metrics, joined)
    if evaluation.breakdown is not None:
        evaluation.breakdown.update(objective.breakdown(joined, roles))
    answers, scored_answers = generated(evaluation, data)
    for name, scored in scored_answers.items():
        metrics[name] = scored.value
        if objective.tasks() is not None:
            metrics[f"{name}/tasks"] = scored.task_mean([row["task"] for row in answers])
        if scored.invalid_rate is not None and scored.unread:
            metrics[f"{name}/{INVALID}"] = scored.invalid_rate
            scores.statistics[f"{name}/{INVALID}"] = np.array([[float(bad), 1.0] for bad in scored.unread])
        if scored.rows:
            scores.statistics[name], scores.totals[name] = np.array(scored.rows), scored.metric.total
    if evaluation.samples:
        drawn = scores.drawn(objective.finish_evaluation if objective.resampled else None)
        # What `finish_evaluation` took out was a sum on the way to a score, not a score.
        drawn = {name: values for name, values in drawn.items() if name in metrics}
        metrics |= all_ends(drawn)
        if evaluation.drawn is not None:
            evaluation.drawn.update(drawn)
    for name in ("nll", "nll/low", "nll/high"):
        if name in metrics:
            metrics[name.replace("nll", "perplexity")] = math.exp(min(metrics[name], 700.0))
    return metrics


def _in_order(parts: list[list[T]]) -> list[T]:
    """Return the rows of all processes in the order of the split, of which each process has every `world`-th."""
    return [part[i] for i in range(max(map(len, parts), default=0)) for part in parts if i < len(part)]


def _rows_in_order(joined: torch.Tensor, world: int) -> torch.Tensor:
    """Return tensors that were joined process after process, (R, ...), in the order of the split."""
    whole = list(range(len(joined)))
    parts = [whole[rank::world] for rank in range(world)]
    places = torch.tensor([place for part in parts for place in part], dtype=torch.long)
    return joined[torch.argsort(places)]


def generated(evaluation: Evaluation, data: Rows) -> tuple[list[dict[str, Any]], dict[str, Scored]]:
    """Return greedily generated answers and their text metrics (`eval.metrics`); record a few as samples (`eval.samples`).

    The rows are divided among the processes; every process generates its own share.
    """
    section, objective, roles = evaluation.section, evaluation.objective, evaluation.roles
    if not (section.metrics or section.samples) or not row_type(objective.rows).prompted or not len(data):
        return [], {}
    count = len(data) if section.metrics else min(section.samples, len(data))
    if section.metrics and section.batches is not None:
        count = min(count, section.batches * evaluation.batch_size)
    own = list(range(count))[evaluation.runtime.rank :: evaluation.runtime.world]
    examples = (lambda indices: objective.examples_of(data, indices, roles)) if objective.gives_examples else None
    sampling = Sampling(max_new_tokens=section.max_new_tokens, stop=tuple(section.stop))
    with evaluation.runtime.gathered(roles.prepared), lasting(f"generating answers to {len(own):,} rows"):
        rows = answer_rows(data, roles, own, sampling, examples)
    rows = [row for part in evaluation.runtime.gather_json(rows) for row in part]
    for row in rows[: section.samples]:
        right = row["references"][0] if len(row["references"]) == 1 else row["references"]
        evaluation.events.sample(step=evaluation.step, prompt=row["prompt"], answer=row["answer"], reference=right)
    scored = score_answers(rows, section.metrics, section.extract)
    for name, found in scored.items():
        if (reason := found.metric.unfit([text for row in rows for text in row["references"]])) is not None:
            evaluation.events.warning(f"eval.metrics: {name}: {reason}", once=True)
    return rows, scored


def _gathered(evaluation: Evaluation, own: torch.Tensor) -> torch.Tensor:
    """Gather a per-row tensor, (R, ...), from every process onto every process."""
    if evaluation.runtime.world == 1:
        return own
    return torch.cat([torch.tensor(part, dtype=own.dtype) for part in evaluation.runtime.gather_json(own.tolist())])


def rows_read(evaluation: Evaluation, data: Rows) -> int:
    """Return the number of rows an evaluation reads, by all processes together: any number of them measures the same rows."""
    most = evaluation.section.batches
    return len(data) if most is None else min(len(data), most * evaluation.batch_size)


def _batches(evaluation: Evaluation, data: Rows) -> Iterator[tuple[list[dict[str, Any]], Batch]]:
    """Yield this process's share of a split in order, in micro-batches with their rows.

    Every process gets at least one (possibly empty).
    """
    indices = list(range(rows_read(evaluation, data)))[evaluation.runtime.rank :: evaluation.runtime.world]
    rows = evaluation.objective.evaluation_rows(data, indices)
    parts = ([[row] for row in rows] or [[]]) if evaluation.row_by_row else list(evaluation.roles.split(rows))
    pace, read = Pace("evaluating, rows", len(rows)), 0
    # Empty ones for a process that has fewer than another and has to make the same passes.
    for part in [*parts, *([[]] * (evaluation.runtime.passes(len(parts)) - len(parts)))]:
        pace.at(read)
        read += len(part)
        yield part, evaluation.objective.collate(part, evaluation.roles)
