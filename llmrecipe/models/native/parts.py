"""The parts of a native transformer, one class each.

Letters: B rows, T tokens, D width, H heads, G key/value heads, E head size, F feed-forward width.

    embedding         X = M[ids] (* sqrt(D))
    self-attention    A = softmax(Q K^T / sqrt(E) + mask), Y = A V W_o; multi-head with G <= H key/value heads
    feed-forward      W_down f(W_up x), or gated W_down (f(W_gate x) * W_up x)
    positions         added (sinusoidal, learned), turned into q and k (rotary), added to scores (relative), or none
    norm              layer norm, or x / rms(x) * g; statistics in float32
    residual          pre: y = x + f(norm x); post: y = norm(x + f(x))

Papers: Attention Is All You Need (arXiv 1706.03762), pre-norm (2002.04745), RoFormer (2104.09864), RMSNorm (1910.07467),
SwiGLU (2002.05202), grouped queries (2305.13245), relative biases (1910.10683).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmrecipe.models.native.config import NativeConfig


class NativeRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, statistics in float32 (or wider)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., D) -> (..., D)."""
        wide = x if x.dtype == torch.float64 else x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def make_norm(config: NativeConfig) -> nn.Module:
    """Return the norm a config names."""
    if config.norm == "rmsnorm":
        return NativeRMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class NativeRotary(nn.Module):
    """Rotary positions: dimensions i and i + E/2 of a head are turned by t * theta^(-2i/E) (split-half layout)."""

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


def sinusoids(position_ids: Tensor, width: int) -> Tensor:
    """Map positions (B, T) to (B, T, D): sin(t / 10000^(2i/D)) in the even dimensions, cos in the odd ones."""
    steps = torch.arange(0, width, 2, device=position_ids.device, dtype=torch.float32)
    angles = position_ids[..., None].float() / 10000.0 ** (steps / width)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., :width]


class RelativeBias(nn.Module):
    """One learned number per head and distance bucket, added to the scores of every layer.

    Half of the buckets are exact distances, the others grow logarithmically up to `relative_distance`; both directions have
    their own half where attention is bidirectional.
    """

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


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention of queries (B, H, T, E) over keys and values (B, G, S, E); return (B, T, H, E) and the weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = nn.functional.dropout(scores.softmax(-1, dtype=wide).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class IntoResidual(nn.Linear):
    """A linear layer whose output is added to the residual stream; pre-norm models initialize it smaller."""


class NativeAttention(nn.Module):
    """Multi-head attention with separate projections, over its own input or over an encoder's states."""

    def __init__(self, config: NativeConfig, layer_idx: int, causal: bool, cross: bool = False):
        super().__init__()
        self.config, self.layer_idx, self.is_causal, self.cross = config, layer_idx, causal, cross
        size, groups, _ = config.sizes()
        own, shared = config.num_attention_heads * size, groups * size
        self.num_key_value_groups = config.num_attention_heads // groups
        self.scaling = 1.0 if config.positions == "relative" else size**-0.5
        self.q_proj = nn.Linear(config.hidden_size, own, bias=config.bias)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=config.bias)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=config.bias)
        self.o_proj = IntoResidual(own, config.hidden_size, bias=config.bias)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        states: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map (B, T, D) to (B, T, D) and, from backends that return them, the attention weights.

        Args:
            states: (B, S, D) the encoder's output, for cross-attention.
        """
        query = self._heads(self.q_proj(hidden_states))
        key, value = self._keys_values(hidden_states if states is None else states, angles, past_key_values)
        if angles is not None:
            query = turn(query, angles)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.dropout if self.training else 0.0
        out, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.flatten(2)), weights

    def _keys_values(self, x: Tensor, angles: tuple[Tensor, Tensor] | None, cache: Cache | None) -> tuple[Tensor, Tensor]:
        pair = cache if isinstance(cache, EncoderDecoderCache) else None
        if self.cross and pair is not None and pair.is_updated.get(self.layer_idx):
            layer: Any = pair.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        key, value = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        if angles is not None:
            key = turn(key, angles)
        if pair is not None and self.cross:
            pair.is_updated[self.layer_idx] = True
            return pair.cross_attention_cache.update(key, value, self.layer_idx)
        own = pair.self_attention_cache if pair is not None else cache
        return (key, value) if own is None or self.cross else own.update(key, value, self.layer_idx)


class NativeFeedForward(nn.Module):
    """W_down f(W_up x), or W_down (f(W_gate x) * W_up x)."""

    def __init__(self, config: NativeConfig):
        super().__init__()
        width = config.sizes()[2]
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.bias) if config.gated else None
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.bias)
        self.down_proj = IntoResidual(width, config.hidden_size, bias=config.bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., D) -> (..., D)."""
        inner = self.act(self.up_proj(x)) if self.gate_proj is None else self.act(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner)


class NativeLayer(GradientCheckpointingLayer):
    """One block: attention, cross-attention where there is an encoder, feed-forward, each with its residual and norm."""

    def __init__(self, config: NativeConfig, layer_idx: int, causal: bool, cross: bool):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.self_attn = NativeAttention(config, layer_idx, causal)
        self.norm_attn = make_norm(config)
        if cross:
            self.cross_attn = NativeAttention(config, layer_idx, False, cross=True)
            self.norm_cross = make_norm(config)
        self.mlp = NativeFeedForward(config)
        self.norm_mlp = make_norm(config)
        self.drop = nn.Dropout(config.dropout)

    def _add(self, x: Tensor, norm: nn.Module, part: Any) -> Tensor:
        if self.pre_norm:
            return x + self.drop(part(norm(x)))
        return norm(x + self.drop(part(x)))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        states: Tensor | None = None,
        states_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Apply the block, (B, T, D) -> (B, T, D)."""

        def attend(x: Tensor) -> Tensor:
            return self.self_attn(x, attention_mask, angles, past_key_values, **kwargs)[0]

        def look(x: Tensor) -> Tensor:
            return self.cross_attn(x, states_mask, None, past_key_values, states, **kwargs)[0]

        hidden_states = self._add(hidden_states, self.norm_attn, attend)
        if states is not None:
            hidden_states = self._add(hidden_states, self.norm_cross, look)
        return self._add(hidden_states, self.norm_mlp, self.mlp)
