"""One score a state: rewards and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """gain * (w . h) + bias in float32 at least, (N, D) -> (N, 1). Only w trains; gain and bias normalise what it learned."""

    gain: Tensor
    bias: Tensor

    def __init__(self, width: int, std: float = 0.0, seed: int = 0):
        super().__init__()
        start = torch.zeros(1, width)
        if std:
            start = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) * std
        self.weight = nn.Parameter(start)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        """Return the scores (N, 1) of hidden states (N, D)."""
        with torch.autocast(h.device.type, enabled=False):
            wide = torch.promote_types(h.dtype, torch.float32)
            return self.gain * F.linear(h.to(wide), self.weight.to(wide)) + self.bias
