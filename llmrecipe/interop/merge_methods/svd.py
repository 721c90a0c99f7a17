"""Merge method: svd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from llmrecipe.core.registry import register
from llmrecipe.interop.merge_method import MergeMethod
from llmrecipe.interop.task_vectors import task_arithmetic


@register
class Svd(MergeMethod):
    """Best low-rank approximation of the weighted sum of the changes.

    The first r singular values of sum_i w_i s_i B_i A_i, at the largest rank r; ranks may differ.
    """

    on: ClassVar[str] = "changes"

    def merge(self, tensors: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        """Return the merger of tensors of one shape."""
        return task_arithmetic(tensors, weights)
