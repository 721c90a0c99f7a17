"""A layer over pooled states, as SimCSE has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseHead(nn.Module):
    """tanh(W h + b) in float32 at least, (N, D) -> (N, D). W is normal, b zero at the start."""

    def __init__(self, width: int, std: float = 0.0, seed: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)) * std)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor) -> Tensor:
        """Return the vectors (N, D) of hidden states (N, D)."""
        with torch.autocast(h.device.type, enabled=False):
            wide = torch.promote_types(h.dtype, torch.float32)
            return torch.tanh(F.linear(h.to(wide), self.weight.to(wide), self.bias.to(wide)))
