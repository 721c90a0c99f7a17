"""Shared bases of the bitsandbytes optimizers: their options, and how the library builds them.

The library offers each in 32 and in 8 bits, some in paged memory. Each variant is a component of its own under `optimizers/`
that names the library's class and its number of bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmrecipe.core.option_types import ClassVar, NonNegativeFloat, OpenFraction, PositiveFloat
from llmrecipe.core.registry import options
from llmrecipe.optim import bnb

if TYPE_CHECKING:
    import torch


class FromLibrary:
    """Base of optimizers that bitsandbytes builds."""

    library: ClassVar[str]
    """Name of the library's class."""
    bits: ClassVar[int]
    """Bits of the state; at 8, tensors under 4096 entries keep 32."""
    states: ClassVar[int]
    """Running averages it keeps."""

    def arguments(self) -> dict[str, Any]:
        """Return the options under the library's argument names."""
        raise NotImplementedError

    def build(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See `Optimizer.build`."""
        return bnb.bnb_optimizer(self.library, params, **self.arguments())

    def state_bytes(self, shape: Sequence[int]) -> int:
        """See `Optimizer.state_bytes`."""
        return bnb.state_bytes(shape, states=self.states, bits=self.bits)


@options
class AdamOptions(FromLibrary):
    """AdamW: two running averages."""

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "xpu")
    states: ClassVar[int] = 2

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

    def arguments(self) -> dict[str, Any]:
        """Return the options under the library's argument names."""
        return {"betas": (self.beta1, self.beta2), "eps": self.eps}


@options
class AdEMAMixOptions(FromLibrary):
    """AdEMAMix: three running averages."""

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "xpu")
    states: ClassVar[int] = 3

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

    def arguments(self) -> dict[str, Any]:
        """Return the options under the library's argument names."""
        return {"betas": (self.beta1, self.beta2, self.beta3), "alpha": self.alpha, "eps": self.eps}


@options
class LionOptions(FromLibrary):
    """Lion: one running average."""

    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "xpu")
    states: ClassVar[int] = 1

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

    def arguments(self) -> dict[str, Any]:
        """Return the options under the library's argument names."""
        return {"betas": (self.beta1, self.beta2)}
