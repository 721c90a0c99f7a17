"""Scores of a sequence from its pooled state, as BERT has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PooledHead(nn.Module):
    """W2 tanh(W1 h + b1) + b2 in float32 at least, (N, D) -> (N, C): the pooler and the outputs of BERT."""

    def __init__(self, width: int, outputs: int, seed: int = 0, std: float = 0.02):
        super().__init__()
        self.dense, self.out = nn.Linear(width, width), nn.Linear(width, outputs)
        draws = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.dense, self.out):
                layer.weight.normal_(0.0, std, generator=draws)
                layer.bias.zero_()

    def forward(self, h: Tensor) -> Tensor:
        """Return the scores (N, C) of hidden states (N, D)."""
        with torch.autocast(h.device.type, enabled=False):
            weight = self.dense.weight
            return self.out(torch.tanh(self.dense(h.to(torch.promote_types(weight.dtype, torch.float32)))))
