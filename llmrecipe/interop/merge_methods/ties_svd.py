"""Merge method: ties_svd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from llmrecipe.core.registry import register
from llmrecipe.interop.merge_method import Density, MergeMethod, Sign
from llmrecipe.interop.task_vectors import ties


@register
class TiesSvd(Density, Sign, MergeMethod):
    """TIES on the changes.

    Each t_i is trimmed to its largest entries, a sign is elected for every entry, and w_i t_i is averaged over those that
    have it (arXiv 2306.01708; there density = 0.2).
    Applied to the changes s_i B_i A_i themselves, as the papers have it; the best approximation of the largest rank is
    kept, and ranks may differ.
    """

    on: ClassVar[str] = "changes"

    def merge(self, tensors: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        """Return the merger of tensors of one shape."""
        return ties(tensors, weights, self.density, self.sign)
