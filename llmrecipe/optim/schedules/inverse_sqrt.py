"""The Transformer paper's rate: warm-up, then one over the square root of the step."""

from __future__ import annotations

import math

from llmrecipe.core.option_types import NonNegativeInt, OpenFraction
from llmrecipe.core.registry import register
from llmrecipe.optim.schedule import Schedule, rise, share_of


@register
class InverseSqrt(Schedule):
    """Inverse square root: factor = sqrt(w / n) at update number n > w, after a warm-up of w updates that ends at 1.

    Needs no end of the run. "Attention Is All You Need", arXiv 1706.03762, scaled so that the peak is 1.
    """

    warmup: NonNegativeInt | OpenFraction = 0.05
    """Steps of linear warm-up, or a share of the run (below 1); it also sets how fast the rate falls."""

    def factor(self, step: int, steps: int) -> float:
        """See `Schedule.factor`."""
        warm = max(1, share_of(self.warmup, steps))
        rising = rise(step, warm)
        return math.sqrt(warm / (step + 1)) if rising is None else rising
