"""Layer norm. Config: norm, norm_eps.

    layernorm   y = (x - mean(x)) / sqrt(var(x) + eps) * g + b
    rmsnorm     y = x / sqrt(mean(x^2) + eps) * g          no mean, no bias: half the parameters and one pass

Over the last dimension, statistics in float32 or wider; g starts at 1, b at 0. With `qk_norm` each head's q and k are normed
before positions turn them, over E (Qwen3).
Papers: Layer Normalization (arXiv 1607.06450), RMSNorm (1910.07467), query-key norm (2010.04245).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmrecipe.models.native.config import NativeConfig


class NativeRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, statistics in float32 (or wider)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., D) -> (..., D)."""
        if x.dtype in (torch.float32, torch.float64):
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def make_norm(config: NativeConfig, width: int | None = None) -> nn.Module:
    """Return the norm a config names, over the model's width or another one."""
    kind = NativeRMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(width or config.hidden_size, eps=config.norm_eps)
