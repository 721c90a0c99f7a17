"""RMSprop, the optimizer of the DPO paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.option_types import NonNegativeFloat, OpenFraction, PositiveFloat
from llmrecipe.core.registry import register
from llmrecipe.optim.optimizer import Optimizer, kernel_flags, numel

if TYPE_CHECKING:
    import torch


@register
class RMSprop(Optimizer):
    """RMSprop: v = alpha v + (1 - alpha) g^2, w -= lr g / (sqrt(v) + eps).

    Half of Adam's state. Used with a linear warm-up of 150 steps and lr 1e-6 in "Direct Preference Optimization",
    arXiv 2305.18290.
    """

    entrywise: ClassVar[bool] = True
    unscaled: ClassVar[bool] = False

    lr: PositiveFloat = 1e-6
    """Learning rate at its peak."""
    alpha: OpenFraction = 0.99
    """Memory of the mean squared gradient."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    momentum: OpenFraction = 0.0
    """Share of the last update that is repeated; 0 keeps no buffer for it."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty on matrices, added to the gradient; norms, biases and adapters do not decay."""
    decay_adapters: bool = False
    """Also decay the matrices of adapters, which pulls them to the base model."""
    clip: NonNegativeFloat = 1.0
    """Largest gradient norm of a step; 0 turns clipping off."""

    def build(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See `Optimizer.build`."""
        from torch.optim import RMSprop as TorchRMSprop

        flags = kernel_flags(params, instead={"foreach": True})
        return TorchRMSprop(params, alpha=self.alpha, eps=self.eps, momentum=self.momentum, **flags)

    def state_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of one 32-bit running average, a second buffer with momentum, and a step counter."""
        return (8 if self.momentum else 4) * numel(shape) + 4
