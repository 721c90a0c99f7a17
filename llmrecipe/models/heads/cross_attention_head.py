"""Cross-attention of a decoder to one vector, as TSDAE has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CrossAttentionHead(nn.Module):
    """Cross-attention of every layer to one vector, in float32 at least: c = W_o W_v z + biases is added to the states.

    With one key, attention is its value: there are no queries and no keys. Where norms come after sublayers there is one here.

    Args:
        like: a norm behind a sublayer of the model; None where norms come before them.
    """

    def __init__(self, width: int, layers: int, like: nn.Module | None = None, std: float = 0.02, seed: int = 0):
        super().__init__()
        self.value = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.ModuleList([] if like is None else [_fresh_norm(like, width) for _ in range(layers)])
        draws = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (*self.value, *self.out):
                layer.weight.normal_(0.0, std, generator=draws)
                layer.bias.zero_()

    def forward(self, z: Tensor) -> list[Tensor]:
        """Return c (R, D) of every layer for the vectors (R, D)."""
        with torch.autocast(z.device.type, enabled=False):
            wide = z.to(torch.promote_types(z.dtype, torch.float32))
            return [_linear(out, _linear(value, wide)) for value, out in zip(self.value, self.out, strict=True)]

    def add(self, layer: int, states: Tensor, c: Tensor) -> Tensor:
        """Return states (R, T, D) with a layer's c (R, D) added, normed where the layers of the model are."""
        with torch.autocast(c.device.type, enabled=False):
            found = states.to(torch.promote_types(states.dtype, c.dtype)) + c[:, None]
            if len(self.norm):
                norm = self.norm[layer]
                found = norm(found.to(next(norm.parameters()).dtype))
            return found.to(states.dtype)


def _fresh_norm(like: nn.Module, width: int) -> nn.Module:
    """Return an untrained norm of the kind of another: a LayerNorm where it has a bias, otherwise an RMSNorm."""
    eps = float(getattr(like, "eps" if hasattr(like, "eps") else "variance_epsilon"))
    return nn.RMSNorm(width, eps=eps) if getattr(like, "bias", None) is None else nn.LayerNorm(width, eps=eps)


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return F.linear(x, layer.weight.to(x), layer.bias.to(x))
