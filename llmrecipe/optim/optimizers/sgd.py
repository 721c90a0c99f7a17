"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import NonNegativeFloat, OpenFraction, PositiveFloat
from llmrecipe.core.registry import register
from llmrecipe.models.sharded import is_sharded
from llmrecipe.optim.optimizer import Optimizer, kernel_flags, numel

if TYPE_CHECKING:
    import torch


@register
class SGD(Optimizer):
    """Stochastic gradient descent: u = momentum u + g, w -= lr u.

    No state without momentum: the cheapest update there is, and slow to tune on transformers.
    The heavy-ball momentum is Polyak's (1964).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    entrywise: ClassVar[bool] = True
    unscaled: ClassVar[bool] = False

    lr: PositiveFloat = 1e-2
    """Learning rate at its peak."""
    momentum: OpenFraction = 0.0
    """Share of the last update that is repeated; 0 keeps no state."""
    nesterov: bool = False
    """Look ahead along the momentum; needs momentum > 0."""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty on matrices, added to the gradient; norms, biases and adapters do not decay."""
    decay_adapters: bool = False
    """Also decay the matrices of adapters, which pulls them to the base model."""
    clip: NonNegativeFloat = 1.0
    """Largest gradient norm of a step; 0 turns clipping off."""

    def build(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See `Optimizer.build`."""
        from torch.optim import SGD as TorchSGD

        if self.nesterov and not self.momentum:
            raise RecipeError("optim.nesterov: needs optim.momentum > 0")
        # The fused kernel has no form for parameters that processes divide.
        divided = any(is_sharded(parameter) for group in params for parameter in group["params"])
        flags = kernel_flags(params, instead={"fused": False} if divided else None)
        return TorchSGD(params, momentum=self.momentum, nesterov=self.nesterov, **flags)

    def state_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of one 32-bit buffer with momentum, 0 without."""
        return 4 * numel(shape) if self.momentum else 0
