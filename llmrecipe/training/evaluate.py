"""Evaluation over a whole split, and the judge that keeps the best checkpoint and stops early."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmrecipe.evaluation.answers import ROWS, answer_rows, score
from llmrecipe.evaluation.directions import Direction
from llmrecipe.evaluation.sampling import Sampling

if TYPE_CHECKING:
    from llmrecipe.training.run import Run


@dataclass(frozen=True)
class Verdict:
    """What the judge says of one evaluation."""

    best: bool
    stop: bool


class Judge:
    """Best value so far and patience.

    `improved = value < best - min_delta` (mode min) or `value > best + min_delta` (mode max); stop after `patience`
    evaluations in a row without improvement.
    """

    def __init__(self, section: Any, mode: Direction):
        self.section, self.mode = section, mode
        self.best: float | None = None
        self.best_step = 0
        self.waited = 0

    def see(self, step: int, metrics: dict[str, float]) -> Verdict:
        """Judge one evaluation.

        Raises:
            RecipeError: the monitored metric does not exist.
        """
        from llmrecipe.errors import RecipeError, did_you_mean

        name = self.section.monitor
        if name not in metrics:
            known = ", ".join(sorted(metrics))
            raise RecipeError(f"eval.monitor: this run has no metric '{name}'{did_you_mean(name, metrics)} (it has {known})")
        value, delta = metrics[name], self.section.min_delta
        sign = 1.0 if self.mode == "min" else -1.0
        improved = not math.isnan(value) and (self.best is None or sign * value < sign * self.best - delta)
        if improved:
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1
        patience = self.section.patience
        return Verdict(improved, patience is not None and self.waited >= patience)

    def state(self) -> dict[str, Any]:
        """JSON facts for a checkpoint."""
        known = {"best": self.best, "best_step": self.best_step, "waited": self.waited}
        return {**known, "monitor": self.section.monitor, "mode": self.mode}

    def load_state(self, state: dict[str, Any]) -> bool:
        """Take back what `state` returned; False, and nothing is known, where another metric or mode judged."""
        if state.get("monitor", self.section.monitor) != self.section.monitor or state.get("mode", self.mode) != self.mode:
            return False
        self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]
        return True


def evaluate(run: Run, data: Any) -> dict[str, float]:
    """Metrics of a split: sums over all its rows and all processes, divided once.

    The result does not depend on the evaluation batch size, padding or the number of processes; random states are put back,
    so a run with evaluations trains exactly as one without.
    """
    state = torch.get_rng_state()
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    gathered: dict[str, list[torch.Tensor]] = defaultdict(list)
    try:
        with run.roles.evaluating(), torch.no_grad():
            for batch in _batches(run, data):
                for name, (value, count) in run.objective.evaluate(batch, run.roles).items():
                    sums[name] += float(value)
                    counts[name] += float(count)
                for name, tensor in run.objective.collect(batch, run.roles).items():
                    gathered[name].append(tensor)
    finally:
        torch.set_rng_state(state)
    names = sorted(sums)
    flat = torch.tensor([sums[n] for n in names] + [counts[n] for n in names], dtype=torch.float64)
    reduced = run.runtime.sum(flat).tolist()
    metrics = {
        n: reduced[i] / reduced[len(names) + i] if reduced[len(names) + i] else float("nan") for i, n in enumerate(names)
    }
    tensors = {n: _gathered(run, torch.cat(gathered[n])) for n in sorted(gathered)}
    metrics |= run.objective.finish_evaluation(metrics, tensors)
    metrics |= generated(run, data)
    if "nll" in metrics:
        metrics["perplexity"] = math.exp(min(metrics["nll"], 700.0))
    return metrics


def generated(run: Run, data: Any) -> dict[str, float]:
    """Text metrics of greedily generated answers (`eval.metrics`), and a few of them as samples (`eval.samples`).

    The answers are shared out over processes by row; every process generates its own share.
    """
    section = run.recipe.eval
    if not (section.metrics or section.samples) or run.objective.rows not in ROWS or not len(data):
        return {}
    count = len(data) if section.metrics else min(section.samples, len(data))
    if section.metrics and section.batches is not None:
        count = min(count, section.batches * run.recipe.batch.size)
    own = list(range(count))[run.runtime.rank :: run.runtime.world]
    rows = answer_rows(data, run.roles, own, Sampling(max_new_tokens=section.max_new_tokens))
    rows = [row for part in run.runtime.gather_json(rows) for row in part]
    for row in rows[: section.samples]:
        run.events.sample(step=run.progress.step, prompt=row["prompt"], answer=row["answer"], reference=row["reference"])
    return score(rows, section.metrics)


def _gathered(run: Run, own: torch.Tensor) -> torch.Tensor:
    """Every process's rows of a per-row tensor, on every process."""
    if run.runtime.world == 1:
        return own
    return torch.cat([torch.tensor(part, dtype=own.dtype) for part in run.runtime.gather_json(own.tolist())])


def _batches(run: Run, data: Any) -> Any:
    """This process's share of a split in order, in micro-batches; every process gets at least one (possibly empty)."""
    most = run.recipe.eval.batches  # of all processes together: any number of them measures the same rows
    count = len(data) if most is None else min(len(data), most * run.recipe.batch.size)
    indices = list(range(count))[run.runtime.rank :: run.runtime.world]
    for part in run.roles.split(run.objective.evaluation_rows(data, indices)):
        yield run.objective.collate(part, run.roles)
