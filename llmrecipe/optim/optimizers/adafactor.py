"""Adafactor, second moments in rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.option_types import NonNegativeFloat, OpenFraction, PositiveFloat
from llmrecipe.core.registry import register
from llmrecipe.optim.optimizer import Optimizer, numel

if TYPE_CHECKING:
    import torch


@register
class Adafactor(Optimizer):
    """Adafactor: the mean squared gradient of a matrix (n, m) is kept as a row mean (n) and a column mean (m).

    v_ij = row_i col_j / mean(row), w -= lr u / max(1, rms(u) / clip_threshold) with u = g / sqrt(v).
    Transformers' implementation with a given learning rate.
    "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv 1804.04235.
    """

    unscaled: ClassVar[bool] = False

    lr: PositiveFloat = 1e-3
    """Learning rate at its peak."""
    beta1: OpenFraction = 0.0
    """Memory of the mean gradient; 0 keeps none, as the paper's memory claim wants."""
    decay_rate: PositiveFloat = 0.8
    """The memory of the mean squares grows as 1 - step^-decay_rate."""
    clip_threshold: PositiveFloat = 1.0
    """Largest root mean square of an update, before the learning rate."""
    scale_parameter: bool = False
    """Multiply the rate by the parameter's own root mean square."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled decay of matrices; norms, biases and adapters do not decay."""
    decay_adapters: bool = False
    """Also decay the matrices of adapters, which pulls them to the base model."""
    clip: NonNegativeFloat = 1.0
    """Largest gradient norm of a step; 0 turns clipping off."""

    def build(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """See `Optimizer.build`."""
        from transformers.optimization import Adafactor as TransformersAdafactor

        return TransformersAdafactor(
            params,
            beta1=self.beta1 or None,
            decay_rate=-self.decay_rate,
            clip_threshold=self.clip_threshold,
            scale_parameter=self.scale_parameter,
            relative_step=False,
        )

    def state_bytes(self, shape: Sequence[int]) -> int:
        """Return 4 bytes per row and column of a matrix, one full average for a vector, one more with beta1, and the RMS."""
        count = numel(shape)
        factored = count // shape[-1] + count // shape[-2] if len(shape) > 1 else count
        return 4 * (factored + (count if self.beta1 else 0)) + 4
