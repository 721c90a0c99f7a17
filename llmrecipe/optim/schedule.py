"""Learning-rate schedules: pure functions of the optimizer step, so they cannot depend on processes, accumulation or resume."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass as pydantic_dataclass

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.registry import CONFIG


@pydantic_dataclass(config=CONFIG, kw_only=True)
class Schedule:
    """A multiplier of the peak learning rate for each optimizer step.

    Steps count optimizer updates, from 0: `factor(0, steps)` belongs to the first update. A warm-up of w steps rises through
    1/w, 2/w, ... and reaches 1 at update number w. The curve then runs from 1 at step w to its end value at `steps`, one past
    the last update, so a rate that ends at zero does not waste the last update.
    """

    group: ClassVar[str] = "schedule"

    def factor(self, step: int, steps: int) -> float:
        """Return the multiplier of update number `step + 1` out of `steps`."""
        raise NotImplementedError

    def check(self, steps: int) -> None:
        """Refuse a schedule that does not fit into the run.

        Raises:
            RecipeError: the warm-up (and the decay, where there is one) takes more steps than the run has.
        """
        warm, decay = share_of(getattr(self, "warmup", 0), steps), share_of(getattr(self, "decay", 0), steps)
        if warm + decay > steps:
            taken = f"{warm} steps of warm-up" + (f" and {decay} of decay" if decay else "")
            raise RecipeError(
                f"schedule.warmup: {taken} do not fit into a run of {steps}; allowed: a share below 1, or fewer steps"
            )


def share_of(amount: int | float, steps: int) -> int:
    """Return a number of steps given as such (int) or as a share of the run (float below 1, rounded)."""
    return amount if isinstance(amount, int) else round(amount * steps)


def rise(step: int, warm: int) -> float | None:
    """Return the multiplier during a warm-up of `warm` steps, None after it."""
    return (step + 1) / warm if step < warm else None


def progress(step: int, start: int, end: int) -> float:
    """Return how much of start..end has passed at a step, 0 to 1."""
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))
