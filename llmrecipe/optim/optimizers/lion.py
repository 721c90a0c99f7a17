"""Lion, the sign of a momentum."""

from __future__ import annotations

from llmrecipe.core.option_types import ClassVar
from llmrecipe.core.registry import register
from llmrecipe.optim.bnb_optimizers import LionOptions
from llmrecipe.optim.optimizer import Optimizer


@register
class Lion(LionOptions, Optimizer):
    """Lion: w -= lr (sign(beta1 m + (1 - beta1) g) + decay w), then m = beta2 m + (1 - beta2) g.

    Every entry moves by lr, so use a third to a tenth of AdamW's rate and 3 to 10 times its decay.
    "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675 (bitsandbytes).
    """

    library: ClassVar[str] = "Lion"
    bits: ClassVar[int] = 32
    entrywise: ClassVar[bool] = True
