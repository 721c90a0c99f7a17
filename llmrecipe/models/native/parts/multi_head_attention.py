"""Multi-head attention: Y = [head_1; ...; head_H] W_o, head_h = attention(x W_q^h, z W_k^h, z W_v^h).

z = x in self-attention; in the cross-attention of an encoder-decoder z are the encoder's states. W_q in R^(D, H E),
W_k, W_v in R^(D, G E), W_o in R^(H E, D), separate linear layers. G < H is grouped-query attention: H / G query heads read
the same key/value head, whose keys and values alone are cached; G = 1 is multi-query attention.

Config: num_attention_heads (H), num_key_value_heads (G), head_dim (E), qk_norm, bias.
Papers: Attention Is All You Need (arXiv 1706.03762), multi-query (1911.02150), grouped-query (2305.13245).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmrecipe.models.native.config import NativeConfig
from llmrecipe.models.native.parts.add_norm import IntoResidual
from llmrecipe.models.native.parts.layer_norm import make_norm
from llmrecipe.models.native.parts.positional_encoding import turn
from llmrecipe.models.native.parts.self_attention import eager_attention_forward
from llmrecipe.models.native.parts.width_scaling import attention_scale


class NativeAttention(nn.Module):
    """Multi-head attention with separate projections, over its own input or over an encoder's states."""

    def __init__(self, config: NativeConfig, layer_idx: int, causal: bool, cross: bool = False):
        super().__init__()
        self.config, self.layer_idx, self.is_causal, self.cross = config, layer_idx, causal, cross
        size, groups, _ = config.sizes()
        own, shared = config.num_attention_heads * size, groups * size
        self.num_key_value_groups = config.num_attention_heads // groups
        self.scaling = attention_scale(config)
        self.q_proj = nn.Linear(config.hidden_size, own, bias=config.bias)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=config.bias)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=config.bias)
        self.o_proj = IntoResidual(own, config.hidden_size, bias=config.bias)
        self.q_norm = make_norm(config, size) if config.qk_norm else None
        self.k_norm = make_norm(config, size) if config.qk_norm else None

    def _heads(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        x = x.unflatten(-1, (-1, self.config.head_dim))
        return (x if norm is None else norm(x)).transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        states: Tensor | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Map (B, T, D) to (B, T, D) and, from backends that return them, the attention weights.

        Args:
            states: (B, S, D) the encoder's output, for cross-attention.
        """
        query = self._heads(self.q_proj(hidden_states), self.q_norm)
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
        key, value = self._heads(self.k_proj(x), self.k_norm), self._heads(self.v_proj(x))
        if angles is not None:
            key = turn(key, angles)
        if pair is not None and self.cross:
            pair.is_updated[self.layer_idx] = True
            return pair.cross_attention_cache.update(key, value, self.layer_idx)
        own = pair.self_attention_cache if pair is not None else cache
        return (key, value) if own is None or self.cross else own.update(key, value, self.layer_idx)
