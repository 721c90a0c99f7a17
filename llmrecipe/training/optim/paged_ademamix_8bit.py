"""AdEMAMix with an 8-bit state that may leave the GPU."""

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
class PagedAdEMAMix8bit(Optimizer):
    """AdEMAMix with an 8-bit state in paged memory: u = (m1^ + alpha m2) / (sqrt(v^) + eps).

    m1 is a fast and m2 a slow mean of the gradient, v the mean of its square.

    "The AdEMAMix Optimizer: Better, Faster, Older", arXiv 2409.03137 (bitsandbytes).
    """

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "xpu")

    lr: PositiveFloat = 2e-4
    """Learning rate at its peak."""
    beta1: OpenFraction = 0.9
    """Memory of the fast mean gradient."""
    beta2: OpenFraction = 0.999
    """Memory of the mean squared gradient."""
    beta3: OpenFraction = 0.9999
    """Memory of the slow mean gradient."""
    alpha: PositiveFloat = 5.0
    """Weight of the slow mean in the update."""
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
        return bnb.build(
            "PagedAdEMAMix8bit", params, betas=(self.beta1, self.beta2, self.beta3), alpha=self.alpha, eps=self.eps
        )

    def state_bytes(self, shape: Sequence[int]) -> int:
        """Three running averages in 8 bits; tensors under 4096 entries keep 32 bits."""
        return bnb.state_bytes(shape, states=3, bits=8)
