"""From pooled states to vectors whose products are scaled cosines, with a scale that is trained."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """sqrt(e^s) W h / |W h| in float32 at least, (N, D) -> (N, P): the product of two vectors is e^s times their cosine.

    The scale is in the vectors, so a model that computes them in one forward pass trains it on every process alike.

    Args:
        scale: e^s at the start.
        std: of W at the start, which is normal.
    """

    def __init__(self, width: int, outputs: int, scale: float = 1.0, std: float = 0.02, seed: int = 0):
        super().__init__()
        self.projection = nn.Parameter(torch.randn(outputs, width, generator=torch.Generator().manual_seed(seed)) * std)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, h: Tensor) -> Tensor:
        """Return the vectors (N, P) of hidden states (N, D)."""
        with torch.autocast(h.device.type, enabled=False):
            wide = torch.promote_types(h.dtype, torch.float32)
            found = F.normalize(F.linear(h.to(wide), self.projection.to(wide)), dim=-1)
            return found * torch.exp(self.log_scale.to(wide) / 2)

    def clamp(self, largest: float) -> None:
        """Keep the scale between 1 and the largest value."""
        with torch.no_grad():
            self.log_scale.clamp_(0.0, math.log(largest))
