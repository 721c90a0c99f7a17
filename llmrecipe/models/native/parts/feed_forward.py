"""Feed-forward, the same for every token. Config: intermediate_size (F), hidden_act (f), gated, bias.

    plain   y = W_down f(W_up x)                     W_up in R^(F, D), W_down in R^(D, F); F = 4 D by default
    gated   y = W_down (f(W_gate x) * W_up x)        one matrix more, F = 8/3 D by default; f = silu is SwiGLU

Papers: Attention Is All You Need (arXiv 1706.03762), section 3.3; GLU variants (2002.05202).
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN

from llmrecipe.models.native.config import NativeConfig
from llmrecipe.models.native.parts.add_norm import IntoResidual


class NativeFeedForward(nn.Module):
    """W_down f(W_up x), or W_down (f(W_gate x) * W_up x)."""

    def __init__(self, config: NativeConfig, width: int | None = None):
        super().__init__()
        width = width or config.sizes()[2]
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.bias) if config.gated else None
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.bias)
        self.down_proj = IntoResidual(width, config.hidden_size, bias=config.bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., D) -> (..., D)."""
        inner = self.act(self.up_proj(x)) if self.gate_proj is None else self.act(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner)
