"""AdEMAMix, Adam with a second, slow momentum."""

from __future__ import annotations

from llmrecipe.core.option_types import ClassVar
from llmrecipe.core.registry import register
from llmrecipe.optim.bnb_optimizers import AdEMAMixOptions
from llmrecipe.optim.optimizer import Optimizer


@register
class AdEMAMix(AdEMAMixOptions, Optimizer):
    """AdEMAMix: u = (m1^ + alpha m2) / (sqrt(v^) + eps).

    m1 is a fast and m2 a slow mean of the gradient, v the mean of its square.

    "The AdEMAMix Optimizer: Better, Faster, Older", arXiv 2409.03137 (bitsandbytes).
    """

    library: ClassVar[str] = "AdEMAMix"
    bits: ClassVar[int] = 32
    entrywise: ClassVar[bool] = True
