"""A straight line down after the warm-up."""

from __future__ import annotations

from llmrecipe.core.option_types import Fraction, NonNegativeInt, OpenFraction
from llmrecipe.core.registry import register
from llmrecipe.optim.schedule import Schedule, progress, rise, share_of


@register
class Linear(Schedule):
    """Linear: factor = 1 - (1 - min_ratio) p, where p runs from 0 at the end of the warm-up to 1 at the end of the run."""

    warmup: NonNegativeInt | OpenFraction = 0
    """Steps of linear warm-up, or a share of the run (below 1)."""
    min_ratio: Fraction = 0.0
    """Where the line ends, as a share of the peak."""

    def factor(self, step: int, steps: int) -> float:
        """See `Schedule.factor`."""
        warm = share_of(self.warmup, steps)
        rising = rise(step, warm)
        return 1.0 - (1.0 - self.min_ratio) * progress(step, warm, steps) if rising is None else rising
