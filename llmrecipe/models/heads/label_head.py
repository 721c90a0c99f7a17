"""From pooled states to one output for each label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LabelHead(nn.Module):
    """W h + b in float32 at least, (N, D) -> (N, C). W is normal, b zero at the start."""

    def __init__(self, width: int, outputs: int, std: float = 0.02, seed: int = 0):
        super().__init__()
        self.out = nn.Linear(width, outputs)
        with torch.no_grad():
            self.out.weight.normal_(0.0, std, generator=torch.Generator().manual_seed(seed))
            self.out.bias.zero_()

    def forward(self, h: Tensor) -> Tensor:
        """Return the scores (N, C) of vectors (N, D)."""
        with torch.autocast(h.device.type, enabled=False):
            wide = torch.promote_types(h.dtype, torch.float32)
            return F.linear(h.to(wide), self.out.weight.to(wide), self.out.bias.to(wide))
