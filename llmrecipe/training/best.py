"""The best evaluation of a run, and early stopping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import RecipeError, did_you_mean
from llmrecipe.core.foreign import stored_count
from llmrecipe.feedback.directions import Direction

if TYPE_CHECKING:
    from llmrecipe.recipe.schema import EvalSection


@dataclass(frozen=True)
class Verdict:
    """What one evaluation means for the run."""

    best: bool
    stop: bool


class BestTracker:
    """Keep the best value of the monitored metric, and count evaluations without a better one.

    `improved = value < best - min_delta` (mode min) or `value > best + min_delta` (mode max); stop after `patience`
    evaluations in a row without improvement, the first `warmup` ones not counted.
    """

    def __init__(self, section: EvalSection, mode: Direction):
        self.section, self.mode = section, mode
        self.best: float | None = None
        self.best_step = 0
        self.waited = 0
        self.seen = 0

    def see(self, step: int, metrics: dict[str, float]) -> Verdict:
        """Compare one evaluation with the best so far.

        Raises:
            RecipeError: the monitored metric does not exist.
        """
        name = self.section.monitor
        if name not in metrics:
            known = ", ".join(sorted(metrics))
            raise RecipeError(f"eval.monitor: this run has no metric '{name}'{did_you_mean(name, metrics)} (it has {known})")
        value, delta = metrics[name], self.section.min_delta
        sign = 1.0 if self.mode == "min" else -1.0
        improved = not math.isnan(value) and (self.best is None or sign * value < sign * self.best - delta)
        self.seen += 1
        if improved:
            self.best, self.best_step, self.waited = value, step, 0
        elif self.seen > self.section.warmup:
            self.waited += 1
        patience = self.section.patience
        return Verdict(improved, patience is not None and self.waited >= patience)

    def state(self) -> dict[str, Any]:
        """Return the JSON state for a checkpoint."""
        known = {"best": self.best, "best_step": self.best_step, "waited": self.waited, "seen": self.seen}
        return {**known, "monitor": self.section.monitor, "mode": self.mode}

    def load_state(self, state: dict[str, Any]) -> bool:
        """Restore what `state` returned; return False, and start fresh, where it came from another metric or mode.

        Raises:
            ValueError: a value is none of its kind.
        """
        if state.get("monitor", self.section.monitor) != self.section.monitor or state.get("mode", self.mode) != self.mode:
            return False
        best = state["best"]
        if best is not None and (not isinstance(best, int | float) or isinstance(best, bool) or math.isnan(best)):
            raise ValueError(f"the best value is {best!r:.60}, no number")
        self.best, self.best_step = best, stored_count(state["best_step"], "the best step")
        self.waited = stored_count(state["waited"], "waited")
        # A checkpoint of an older version does not say how many evaluations there were; it knew no warm-up.
        self.seen = stored_count(state.get("seen", 0), "seen")
        return True
