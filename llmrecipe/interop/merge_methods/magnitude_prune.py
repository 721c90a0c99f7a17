"""Merge method: magnitude_prune."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmrecipe.core.registry import register
from llmrecipe.interop.merge_method import Density, MergeMethod
from llmrecipe.interop.task_vectors import magnitude_prune


@register
class MagnitudePrune(Density, MergeMethod):
    """Magnitude pruning of the factors.

    sum_i w_i top(t_i): of each t_i the share `density` with the largest magnitudes is kept, the rest is zero.
    Applied to all A and to all B of a weight, weighted as in `linear`; needs equal ranks. PEFT does the same.
    """

    def merge(self, tensors: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        """Return the merger of tensors of one shape."""
        return magnitude_prune(tensors, weights, self.density)
