"""RMSprop with its state in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmrecipe.core.option_types import ClassVar, NonNegativeFloat, OpenFraction, PositiveFloat
from llmrecipe.core.registry import register
from llmrecipe.optim import bnb
from llmrecipe.optim.optimizer import Optimizer

if TYPE_CHECKING:
    import torch


@register
class RMSprop8bit(Optimizer):
    """RMSprop with an 8-bit running average: v = alpha v + (1 - alpha) g^2, w -= lr g / (sqrt(v) + eps).

    An eighth of Adam's state. "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861 (bitsandbytes).
    """

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "xpu")
    unscaled: ClassVar[bool] = False

    lr: PositiveFloat = 1e-6
    """Learning rate at its peak."""
    alpha: OpenFraction = 0.99
    """Memory of the mean squared gradient."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty on matrices, added to the gradient; norms, biases and adapters do not decay."""
    decay_adapters: bool = False
    """Also decay the matrices of adapters, which pulls them to the base model."""
    clip: NonNegativeFloat = 1.0
    """Largest gradient norm of a step; 0 turns clipping off."""

    def build(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See `Optimizer.build`."""
        return bnb.bnb_optimizer("RMSprop8bit", params, alpha=self.alpha, eps=self.eps)

    def state_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of one running average in 8 bits; tensors under 4096 entries keep 32 bits."""
        return bnb.state_bytes(shape, states=1, bits=8)
