"""A constant rate after the warm-up."""

from __future__ import annotations

from llmrecipe.core.option_types import NonNegativeInt, OpenFraction
from llmrecipe.core.registry import register
from llmrecipe.optim.schedule import Schedule, rise, share_of


@register
class Constant(Schedule):
    """Constant: factor = 1 after the warm-up.

    The rate does not need to know how long the run is; right for short runs and for comparing methods.
    """

    warmup: NonNegativeInt | OpenFraction = 0
    """Steps of linear warm-up, or a share of the run (below 1)."""

    def factor(self, step: int, steps: int) -> float:
        """See `Schedule.factor`."""
        rising = rise(step, share_of(self.warmup, steps))
        return 1.0 if rising is None else rising
