"""Merge method: ties."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmrecipe.core.registry import register
from llmrecipe.interop.merge_method import Density, MergeMethod, Sign
from llmrecipe.interop.task_vectors import ties


@register
class Ties(Density, Sign, MergeMethod):
    """TIES on the factors.

    Each t_i is trimmed to its largest entries, a sign is elected for every entry, and w_i t_i is averaged over those that
    have it (arXiv 2306.01708; there density = 0.2).
    Applied to all A and to all B of a weight, weighted as in `linear`; needs equal ranks. PEFT does the same.
    """

    def merge(self, tensors: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        """Return the merger of tensors of one shape."""
        return ties(tensors, weights, self.density, self.sign)
