"""Half a cosine down after the warm-up."""

from __future__ import annotations

import math

from llmrecipe.core.option_types import Fraction, NonNegativeInt, OpenFraction
from llmrecipe.core.registry import register
from llmrecipe.optim.schedule import Schedule, progress, rise, share_of


@register
class Cosine(Schedule):
    """Cosine: factor = min_ratio + (1 - min_ratio) (1 + cos(pi p)) / 2, p from 0 after the warm-up to 1 at the end of the run.

    "SGDR: Stochastic Gradient Descent with Warm Restarts", arXiv 1608.03983, without the restarts.
    """

    warmup: NonNegativeInt | OpenFraction = 0
    """Steps of linear warm-up, or a share of the run (below 1)."""
    min_ratio: Fraction = 0.0
    """Where the curve ends, as a share of the peak."""

    def factor(self, step: int, steps: int) -> float:
        """See `Schedule.factor`."""
        warm = share_of(self.warmup, steps)
        rising = rise(step, warm)
        if rising is not None:
            return rising
        return self.min_ratio + (1.0 - self.min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress(step, warm, steps)))
