"""Merge method: magnitude_prune_svd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from llmrecipe.core.registry import register
from llmrecipe.interop.merge_method import Density, MergeMethod
from llmrecipe.interop.task_vectors import magnitude_prune


@register
class MagnitudePruneSvd(Density, MergeMethod):
    """Magnitude pruning of the changes.

    sum_i w_i top(t_i): of each t_i the share `density` with the largest magnitudes is kept, the rest is zero.
    Applied to the changes s_i B_i A_i themselves, as the papers have it; the best approximation of the largest rank is
    kept, and ranks may differ.
    """

    on: ClassVar[str] = "changes"

    def merge(self, tensors: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        """Return the merger of tensors of one shape."""
        return magnitude_prune(tensors, weights, self.density)
