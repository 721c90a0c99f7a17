"""Warm-up, a long stable phase, then a short decay."""

from __future__ import annotations

import math

from llmrecipe.core.option_types import Fraction, Literal, NonNegativeInt, OpenFraction
from llmrecipe.core.registry import register
from llmrecipe.optim.schedule import Schedule, progress, rise, share_of


@register
class WSD(Schedule):
    """WSD: factor = 1 until the last `decay` steps, then 1 - (1 - min_ratio) f(p), p from 0 to 1 over those steps.

    f(p) is p (linear), (1 - cos(pi p)) / 2 (cosine) or sqrt(p) (sqrt). A stable phase can be continued or branched, since it
    does not know where the run ends. "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training
    Strategies", arXiv 2404.06395; the square root is that of "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
    Durations", arXiv 2405.18392.
    """

    warmup: NonNegativeInt | OpenFraction = 0
    """Steps of linear warm-up, or a share of the run (below 1)."""
    decay: NonNegativeInt | OpenFraction = 0.2
    """Steps of decay at the end, or a share of the run (below 1)."""
    shape: Literal["linear", "cosine", "sqrt"] = "sqrt"
    """How the decay falls."""
    min_ratio: Fraction = 0.0
    """Where the decay ends, as a share of the peak."""

    def factor(self, step: int, steps: int) -> float:
        """See `Schedule.factor`."""
        rising = rise(step, share_of(self.warmup, steps))
        if rising is not None:
            return rising
        start = steps - share_of(self.decay, steps)
        if step < start:
            return 1.0
        p = progress(step, start, steps)
        fall = {"linear": p, "cosine": 0.5 * (1.0 - math.cos(math.pi * p)), "sqrt": math.sqrt(p)}[self.shape]
        return 1.0 - (1.0 - self.min_ratio) * fall
