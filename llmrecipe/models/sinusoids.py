"""Sinusoids of positions (arXiv 1706.03762)."""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoids(position_ids: Tensor, width: int) -> Tensor:
    """Map positions (...) to (..., D): sines in the even dimensions, cosines in the odd ones."""
    steps = torch.arange(0, width, 2, device=position_ids.device, dtype=torch.float32)
    angles = position_ids[..., None].float() / 10000.0 ** (steps / width)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., :width]
