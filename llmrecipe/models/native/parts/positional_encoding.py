"""Positional encoding: what tells a token at position t from the same token elsewhere. Config: positions.

    sinusoidal  PE[t, 2i] = sin(t / 10000^(2i/D)), PE[t, 2i+1] = cos(t / 10000^(2i/D)), fixed, added to the embedding
    learned     P in R^(T_max, D), trained, row t added to the embedding                     max_position_embeddings (T_max)
    rotary      dimensions i and i + E/2 of q and k of every head are turned by t * theta^(-2i/E), so that q_s . k_t
                depends on s - t alone (split-half layout, as in Llama)                      rope_theta
    relative    b[h, bucket(j - i)] added to the score of query i and key j, shared by all layers; scores are then not divided
                by sqrt(E). Half of the buckets are exact distances, the others grow logarithmically up to a largest one; both
                directions have their own half where attention is bidirectional (T5)         relative_buckets, relative_distance
    none        no positions: an encoder does not see the order of its tokens

t counts from the first real token of a row, so left and right padding are equivalent, and restarts with each packed document.
Papers: sinusoidal arXiv 1706.03762; rotary: RoFormer (2104.09864); relative: T5 (1910.10683).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llmrecipe.models.native.config import NativeConfig


def learned_positions(config: NativeConfig) -> nn.Embedding | None:
    """Return the table P, or None where positions are not learned."""
    return nn.Embedding(config.max_position_embeddings, config.hidden_size) if config.positions == "learned" else None


class NativeRotary(nn.Module):
    """Rotary positions: dimensions i and i + E/2 of a head are turned by t * theta^(-2i/E)."""

    def __init__(self, config: NativeConfig):
        super().__init__()
        self.size, self.theta = config.sizes()[0], config.rope_theta

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Map positions (B, T) to cosines and sines (B, 1, T, E), in float32."""
        steps = torch.arange(0, self.size, 2, device=position_ids.device, dtype=torch.float32)
        angles = position_ids[:, None, :, None].float() * self.theta ** (-steps / self.size)
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()


def turn(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate (B, H, T, E) by the angles of its positions."""
    first, second = x.chunk(2, -1)
    cosine, sine = (part.to(x.dtype) for part in angles)
    return x * cosine + torch.cat((-second, first), -1) * sine


class RelativeBias(nn.Module):
    """b: one learned number per bucket and head, added to the scores of every layer."""

    def __init__(self, config: NativeConfig, causal: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.relative_buckets, config.num_attention_heads))
        self.causal, self.buckets, self.distance = causal, config.relative_buckets, config.relative_distance

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Map positions (B, Tq) and (B, Tk) to biases (B, H, Tq, Tk)."""
        gap = keys[:, None, :] - queries[:, :, None]
        count, base = self.buckets, torch.zeros_like(gap)
        if self.causal:
            gap = (-gap).clamp(min=0)
        else:
            count //= 2
            base, gap = (gap > 0).long() * count, gap.abs()
        exact = count // 2
        far = (gap.clamp(min=1).float() / exact).log() / math.log(self.distance / exact) * (count - exact)
        bucket = base + torch.where(gap < exact, gap, (exact + far.long()).clamp(max=count - 1))
        return self.weight[bucket].permute(0, 3, 1, 2)
