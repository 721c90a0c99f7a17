"""Lion with its momentum in 8 bits."""

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
class Lion8bit(Optimizer):
    """Lion with an 8-bit momentum: w -= lr (sign(beta1 m + (1 - beta1) g) + decay w), then m = beta2 m + (1 - beta2) g.

    Every entry moves by lr, so use a third to a tenth of AdamW's rate and 3 to 10 times its decay.
    "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675 (bitsandbytes).
    """

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "xpu")

    lr: PositiveFloat = 3e-5
    """Learning rate at its peak."""
    beta1: OpenFraction = 0.9
    """Share of the momentum in the update's direction."""
    beta2: OpenFraction = 0.99
    """Memory of the momentum."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay of matrices; norms, biases and adapters do not decay."""
    decay_adapters: bool = False
    """Also decay the matrices of adapters, which pulls them to the base model."""
    clip: NonNegativeFloat = 1.0
    """Largest gradient norm of a step; 0 turns clipping off."""

    def build(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See `Optimizer.build`."""
        return bnb.build("Lion8bit", params, betas=(self.beta1, self.beta2))

    def state_bytes(self, shape: Sequence[int]) -> int:
        """One running average in 8 bits; tensors under 4096 entries keep 32 bits."""
        return bnb.state_bytes(shape, states=1, bits=8)
