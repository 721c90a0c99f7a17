"""Evaluation over a whole split."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from llmrecipe.data.tokenize.row_type import row_type
from llmrecipe.engine.sampling import Sampling
from llmrecipe.feedback.generated_answers import answer_rows, score_answers
from llmrecipe.methods._base.update_rule import MetricSums

if TYPE_CHECKING:
    from llmrecipe.data.collate import Batch
    from llmrecipe.data.prepare import Rows
    from llmrecipe.engine.role_models import Roles
    from llmrecipe.objectives.base import Objective
    from llmrecipe.recipe.schema import EvalSection
    from llmrecipe.runtime.processes import Runtime


class Samples(Protocol):
    """Where an evaluation shows samples of answers: the events of a run, or the terminal."""

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


def evaluate(evaluation: Evaluation, data: Rows) -> dict[str, float]:
    """Compute metrics of a split: sums over all its rows and all processes, divided once.

    The result does not depend on the evaluation batch size, padding or the number of processes; random states are put back,
    so a run with evaluations trains exactly as one without.
    """
    state = torch.get_rng_state()
    sums = MetricSums()
    gathered: dict[str, list[torch.Tensor]] = defaultdict(list)
    try:
        with evaluation.roles.evaluating(), torch.no_grad():
            for batch in _batches(evaluation, data):
                sums.add(evaluation.objective.evaluate(batch, evaluation.roles))
                for name, tensor in evaluation.objective.collect(batch, evaluation.roles).items():
                    gathered[name].append(tensor)
    finally:
        torch.set_rng_state(state)
    metrics = sums.mean(evaluation.runtime)
    tensors = {n: _gathered(evaluation, torch.cat(gathered[n])) for n in sorted(gathered)}
    metrics |= evaluation.objective.finish_evaluation(metrics, tensors)
    metrics |= generated(evaluation, data)
    if "nll" in metrics:
        metrics["perplexity"] = math.exp(min(metrics["nll"], 700.0))
    return metrics


def generated(evaluation: Evaluation, data: Rows) -> dict[str, float]:
    """Compute text metrics of greedily generated answers (`eval.metrics`), and record a few as samples (`eval.samples`).

    The rows are divided among the processes; every process generates its own share.
    """
    section = evaluation.section
    if not (section.metrics or section.samples) or not row_type(evaluation.objective.rows).prompted or not len(data):
        return {}
    count = len(data) if section.metrics else min(section.samples, len(data))
    if section.metrics and section.batches is not None:
        count = min(count, section.batches * evaluation.batch_size)
    own = list(range(count))[evaluation.runtime.rank :: evaluation.runtime.world]
    rows = answer_rows(data, evaluation.roles, own, Sampling(max_new_tokens=section.max_new_tokens))
    rows = [row for part in evaluation.runtime.gather_json(rows) for row in part]
    for row in rows[: section.samples]:
        evaluation.events.sample(step=evaluation.step, prompt=row["prompt"], answer=row["answer"], reference=row["reference"])
    return score_answers(rows, section.metrics)


def _gathered(evaluation: Evaluation, own: torch.Tensor) -> torch.Tensor:
    """Gather a per-row tensor, (R, ...), from every process onto every process."""
    if evaluation.runtime.world == 1:
        return own
    return torch.cat([torch.tensor(part, dtype=own.dtype) for part in evaluation.runtime.gather_json(own.tolist())])


def rows_read(evaluation: Evaluation, data: Rows) -> int:
    """Return the number of rows an evaluation reads, by all processes together: any number of them measures the same rows."""
    most = evaluation.section.batches
    return len(data) if most is None else min(len(data), most * evaluation.batch_size)


def _batches(evaluation: Evaluation, data: Rows) -> Iterator[Batch]:
    """Yield this process's share of a split in order, in micro-batches; every process gets at least one (possibly empty)."""
    indices = list(range(rows_read(evaluation, data)))[evaluation.runtime.rank :: evaluation.runtime.world]
    for part in evaluation.roles.split(evaluation.objective.evaluation_rows(data, indices)):
        yield evaluation.objective.collate(part, evaluation.roles)
