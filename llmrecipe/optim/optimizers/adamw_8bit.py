"""AdamW with its state in 8 bits."""

from __future__ import annotations

from llmrecipe.core.option_types import ClassVar
from llmrecipe.core.registry import register
from llmrecipe.optim.bnb_optimizers import AdamOptions
from llmrecipe.optim.optimizer import Optimizer


@register
class AdamW8bit(AdamOptions, Optimizer):
    """AdamW with both running averages stored in 8 bits, one scale for each block of 256 entries.

    A quarter of AdamW's state. "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861 (bitsandbytes).
    """

    library: ClassVar[str] = "AdamW8bit"
    bits: ClassVar[int] = 8
