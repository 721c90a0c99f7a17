"""Merge method: dare_linear."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmrecipe.core.registry import register
from llmrecipe.interop.merge_method import Density, MergeMethod
from llmrecipe.interop.task_vectors import dare_linear


@register
class DareLinear(Density, MergeMethod):
    """DARE on the factors.

    sum_i w_i m_i t_i / density with m_i ~ Bernoulli(density) for each entry: unbiased (arXiv 2311.03099; density 0.1 to 0.5).
    Applied to all A and to all B of a weight, weighted as in `linear`; needs equal ranks. PEFT does the same.
    """

    def merge(self, tensors: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        """Return the merger of tensors of one shape."""
        return dare_linear(tensors, weights, self.density, generator)
