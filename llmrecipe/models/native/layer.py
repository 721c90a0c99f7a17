"""One block of a native transformer, put together from its parts."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from llmrecipe.models.native.config import NativeConfig
from llmrecipe.models.native.parts.add_norm import add_norm
from llmrecipe.models.native.parts.feed_forward import NativeFeedForward
from llmrecipe.models.native.parts.layer_norm import make_norm
from llmrecipe.models.native.parts.mixture_of_experts import NativeMixture
from llmrecipe.models.native.parts.multi_head_attention import NativeAttention


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
        self.mlp = NativeMixture(config) if config.num_experts else NativeFeedForward(config)
        self.norm_mlp = make_norm(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        states: Tensor | None = None,
        states_mask: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Apply the block, (B, T, D) -> (B, T, D)."""

        def attend(x: Tensor) -> Tensor:
            return self.self_attn(x, attention_mask, angles, past_key_values, **kwargs)[0]

        def look(x: Tensor) -> Tensor:
            return self.cross_attn(x, states_mask, None, past_key_values, states, **kwargs)[0]

        x = add_norm(hidden_states, attend, self.norm_attn, self.drop, self.pre_norm)
        if states is not None:
            x = add_norm(x, look, self.norm_cross, self.drop, self.pre_norm)
        return add_norm(x, self.mlp, self.norm_mlp, self.drop, self.pre_norm)
