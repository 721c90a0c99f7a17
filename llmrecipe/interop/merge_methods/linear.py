"""Merge method: linear."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmrecipe.core.registry import register
from llmrecipe.interop.merge_method import MergeMethod
from llmrecipe.interop.task_vectors import task_arithmetic


@register
class Linear(MergeMethod):
    """Weighted sum of the factors.

    (sum_i sqrt(|w_i s_i|) B_i) (sum_i sgn(w_i) sqrt(|w_i s_i|) A_i): keeps the rank, adds products of different adapters; needs
    equal ranks.
    """

    def merge(self, tensors: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        """Return the merger of tensors of one shape."""
        return task_arithmetic(tensors, weights)
