"""Merge method: dare_linear_svd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from llmrecipe.core.registry import register
from llmrecipe.interop.merge_method import Density, MergeMethod
from llmrecipe.interop.task_vectors import dare_linear


@register
class DareLinearSvd(Density, MergeMethod):
    """DARE on the changes.

    sum_i w_i m_i t_i / density with m_i ~ Bernoulli(density) for each entry: unbiased (arXiv 2311.03099; density 0.1 to 0.5).
    Applied to the changes s_i B_i A_i themselves, as the papers have it; the best approximation of the largest rank is
    kept, and ranks may differ.
    """

    on: ClassVar[str] = "changes"

    def merge(self, tensors: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        """Return the merger of tensors of one shape."""
        return dare_linear(tensors, weights, self.density, generator)
