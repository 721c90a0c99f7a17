"""AdamW in paged memory, under the name the QLoRA paper's recipes use."""

from __future__ import annotations

from llmrecipe.core.option_types import ClassVar
from llmrecipe.core.registry import register
from llmrecipe.optim.bnb_optimizers import AdamOptions
from llmrecipe.optim.optimizer import Optimizer


@register
class PagedAdamW32bit(AdamOptions, Optimizer):
    """AdamW with a 32-bit state in paged memory, by its full name; the same update as `paged_adamw`.

    Paging moves optimizer state to host memory when the GPU runs out and back when it is needed; on a CPU it does nothing.
    "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314 (bitsandbytes).
    """

    library: ClassVar[str] = "PagedAdamW32bit"
    bits: ClassVar[int] = 32
