"""Merge method: dare_ties_svd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from llmrecipe.core.registry import register
from llmrecipe.interop.merge_method import Density, MergeMethod, Sign
from llmrecipe.interop.task_vectors import dare_ties


@register
class DareTiesSvd(Density, Sign, MergeMethod):
    """DARE with the signs of TIES on the changes.

    Entries are dropped and rescaled as in DARE, then a sign is elected for every entry and w_i t_i is averaged over those that
    have it, as in TIES (arXiv 2311.03099, 2306.01708).
    Applied to the changes s_i B_i A_i themselves, as the papers have it; the best approximation of the largest rank is
    kept, and ranks may differ.
    """

    on: ClassVar[str] = "changes"

    def merge(self, tensors: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        """Return the merger of tensors of one shape."""
        return dare_ties(tensors, weights, self.density, self.sign, generator)
