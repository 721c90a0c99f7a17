"""AdamW with an 8-bit state that may leave the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmrecipe.fields import ClassVar, NonNegativeFloat, OpenFraction, PositiveFloat
from llmrecipe.registry import register
from llmrecipe.training import bnb
from llmrecipe.training.optimizer import Optimizer

if TYPE_CHECKING:
    import torch


@register
class PagedAdamW8bit(Optimizer):
    """AdamW with an 8-bit state in paged memory.

    Paging moves optimizer state to host memory when the GPU runs out and back when it is needed; on a CPU it does nothing.
    "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314 (bitsandbytes).
    """

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "xpu")

    lr: PositiveFloat = 2e-4
    """Learning rate at its peak."""
    beta1: OpenFraction = 0.9
    """Memory of the mean gradient."""
    beta2: OpenFraction = 0.999
    """Memory of the mean squared gradient."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay of matrices; norms, biases and adapters do not decay."""
    decay_adapters: bool = False
    """Also decay the matrices of adapters, which pulls them to the base model."""
    clip: NonNegativeFloat = 1.0
    """Largest gradient norm of a step; 0 turns clipping off."""

    def build(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See `Optimizer.build`."""
        return bnb.build("PagedAdamW8bit", params, betas=(self.beta1, self.beta2), eps=self.eps)

    def state_bytes(self, shape: Sequence[int]) -> int:
        """Two running averages in 8 bits; tensors under 4096 entries keep 32 bits."""
        return bnb.state_bytes(shape, states=2, bits=8)
