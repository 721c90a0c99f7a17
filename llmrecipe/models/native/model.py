"""The native backbone: one stack of blocks, or an encoder and a decoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, Seq2SeqMoEModelOutput
from transformers.utils import ModelOutput
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from llmrecipe.models.kv_cache import cache_of
from llmrecipe.models.native.config import NativeConfig
from llmrecipe.models.native.layer import NativeLayer
from llmrecipe.models.native.parts.add_norm import IntoResidual
from llmrecipe.models.native.parts.embedding import scaled, segment_embedding, token_embedding
from llmrecipe.models.native.parts.layer_norm import NativeRMSNorm, make_norm
from llmrecipe.models.native.parts.mixture_of_experts import GatedExperts, NativeRouter, PlainExperts
from llmrecipe.models.native.parts.multi_head_attention import NativeAttention
from llmrecipe.models.native.parts.patch_embedding import PatchEmbedding
from llmrecipe.models.native.parts.positional_encoding import NativeRotary, RelativeBias, learned_positions
from llmrecipe.models.native.parts.width_scaling import matrix_rates, start_divisor
from llmrecipe.models.sinusoids import sinusoids


class NativePreTrainedModel(PreTrainedModel):
    """Base class with what Transformers needs to know about the family."""

    config_class = NativeConfig
    config: NativeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NativeLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _can_compile_fullgraph = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": NativeLayer,
        "attentions": OutputRecorder(NativeAttention, layer_name="self_attn", index=1),
        "cross_attentions": OutputRecorder(NativeAttention, layer_name="cross_attn", index=1),
        "router_logits": OutputRecorder(NativeRouter, index=0),
    }

    def learning_rate_scales(self) -> dict[str, float]:
        """Map parameter name -> multiplier of the learning rate (see `parts.width_scaling`)."""
        return matrix_rates(self, self.config)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Return that the kernel of the experts may be chosen; Transformers would look for them in this file."""
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize weights with N(0, std); with pre-norm, scale residual projections by 1/sqrt(2 L) against depth.

        Widths other than `mup_base_width` change std as `parts.width_scaling` says.
        """
        std = self.config.initializer_range / start_divisor(module, self, self.config)
        shrink = math.sqrt(2 * self.config.num_hidden_layers) if self.config.pre_norm else 1.0
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std / shrink if isinstance(module, IntoResidual) else std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
            if module.padding_idx is not None:
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, (nn.LayerNorm, NativeRMSNorm)):
            init.ones_(module.weight)
            bias = getattr(module, "bias", None)
            if bias is not None:
                init.zeros_(bias)
        elif isinstance(module, (RelativeBias, NativeRouter)):
            init.normal_(module.weight, std=std)
        elif isinstance(module, (GatedExperts, PlainExperts)):
            for name, tensor in module.named_parameters(recurse=False):
                init.normal_(tensor, std=std / shrink if name == "down_proj" else std)
        elif isinstance(module, PatchEmbedding):
            init.normal_(module.class_token, std=std)


class NativeStack(NativePreTrainedModel):
    """Embedding, positions and blocks of one side."""

    def __init__(self, config: NativeConfig, side: str):
        super().__init__(config)
        self.causal = side == "decoder"
        cross = self.causal and config.is_encoder_decoder
        if config.kind == "vision":
            self.patches = PatchEmbedding(config)
        else:
            self.embed_tokens = token_embedding(config)
        self.positions = learned_positions(config)
        self.types = segment_embedding(config) if config.kind != "vision" else None
        self.rotary = NativeRotary(config) if config.positions == "rotary" else None
        self.relative = RelativeBias(config, self.causal) if config.positions == "relative" else None
        self.embed_norm = make_norm(config) if config.embed_norm else None
        self.drop = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(NativeLayer(config, i, self.causal, cross) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config) if config.pre_norm else None
        self.gradient_checkpointing = False
        self.post_init()

    def _inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, pixel_values: Tensor | None) -> Tensor:
        """Return embeddings (B, T, D) without positions.

        Raises:
            ValueError: not exactly one kind of input, or one that this kind of model does not read.
        """
        name = "pixel_values" if self.config.kind == "vision" else "input_ids"
        ids, other = (pixel_values, input_ids) if name == "pixel_values" else (input_ids, pixel_values)
        if (ids is None) == (inputs_embeds is None) or other is not None:
            raise ValueError(f"kind: {self.config.kind} reads exactly one of {name} and inputs_embeds")
        if ids is None:
            assert inputs_embeds is not None
            return inputs_embeds
        return self.patches(ids) if name == "pixel_values" else self.embed_tokens(ids)

    def _embed(self, x: Tensor, position_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        x = scaled(x, self.config)
        if self.positions is not None:
            x = x + self.positions(position_ids)
        elif self.config.positions == "sinusoidal":
            x = x + sinusoids(position_ids, self.config.hidden_size).to(x.dtype)
        if self.types is not None:
            x = x + self.types(torch.zeros_like(position_ids) if token_type_ids is None else token_type_ids)
        return self.drop(x if self.embed_norm is None else self.embed_norm(x))

    def _places(self, x: Tensor, mask: Tensor | None, seen: int) -> Tensor:
        """Return positions (B, T), counted from the first real token, so left and right padding are equivalent."""
        rows, columns = x.shape[:2]
        if mask is not None and mask.dim() == 2:
            counted = (mask.long().cumsum(-1) - 1).clamp(min=0)
            return counted[:, -columns:]
        return (torch.arange(columns, device=x.device) + seen).expand(rows, -1)

    def _mask(self, x: Tensor, mask: Tensor | None, cache: Cache | None, position_ids: Tensor, packed: bool) -> Tensor | None:
        found: Any
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        # Positions that restart indicate packed documents to the mask builder; they are passed only if the caller gave them.
        if self.causal:
            found = create_causal_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=mask,
                past_key_values=own,
                position_ids=position_ids if packed else None,
                allow_is_causal_skip=self.relative is None,
            )
        else:
            found = create_bidirectional_mask(
                config=self.config, inputs_embeds=x, attention_mask=mask, allow_is_bidirectional_skip=self.relative is None
            )
        if self.relative is None:
            return found
        columns = x.shape[1] if own is None else own.get_mask_sizes(x.shape[1], 0)[0]
        keys = position_ids
        if columns > x.shape[1]:
            past = torch.arange(columns, device=x.device).expand(x.shape[0], -1)
            keys = past if mask is None or mask.dim() != 2 else (mask.long().cumsum(-1) - 1).clamp(min=0)
        bias = self.relative(*_once(position_ids, keys)).to(x.dtype)
        if found is None:
            return bias
        return bias.masked_fill(~found, torch.finfo(bias.dtype).min) if found.dtype == torch.bool else bias + found

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Map ids (B, T), embeddings (B, T, D) or images to states (B, T, D) and, for decoders, the cache."""
        x = self._inputs(input_ids, inputs_embeds, pixel_values)
        use_cache = self.causal and (self.config.use_cache if use_cache is None else use_cache)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
            if encoder_hidden_states is not None:
                past_key_values = EncoderDecoderCache(past_key_values, DynamicCache(config=self.config))
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        packed = position_ids is not None
        if position_ids is None:
            position_ids = self._places(x, attention_mask, seen)
        mask = self._mask(x, attention_mask, past_key_values, position_ids, packed)
        states_mask = None
        if encoder_hidden_states is not None and encoder_attention_mask is not None:
            states_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
            )
        angles = None if self.rotary is None else self.rotary(position_ids)
        x = self._embed(x, position_ids, token_type_ids)
        for layer in self.layers:
            x = layer(x, mask, angles, past_key_values, encoder_hidden_states, states_mask, **kwargs)
        x = x if self.norm is None else self.norm(x)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=x, past_key_values=past_key_values if use_cache else None
        )


def _once(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions (1, T) where all rows have the same, so that what depends on them is computed for one row."""
    if is_tracing(queries) or not bool((queries == queries[:1]).all() and (keys == keys[:1]).all()):
        return queries, keys
    return queries[:1], keys[:1]


class NativeModel(NativePreTrainedModel):
    """The backbone without a head: `decoder`, `encoder`, or both over one embedding."""

    def __init__(self, config: NativeConfig):
        super().__init__(config)
        self.encoder = NativeStack(config, "encoder") if config.kind != "decoder" else None
        self.decoder = NativeStack(config, "decoder") if config.kind in ("decoder", "encoder_decoder") else None
        if self.encoder is not None and self.decoder is not None:
            # Both sides share one embedding, whether or not the head is tied to it as well.
            self.decoder.embed_tokens = self.encoder.embed_tokens
            self._tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}
        self.post_init()

    @property
    def main(self) -> NativeStack:
        """Return the stack that reads the input ids."""
        stack = self.decoder if self.encoder is None else self.encoder
        assert stack is not None
        return stack

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding, or the projection of patches."""
        return self.main.patches.projection if self.config.kind == "vision" else self.main.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding on every side, or the projection of patches."""
        if self.config.kind == "vision":
            self.main.patches.projection = value  # type: ignore[assignment]
            return
        for stack in (self.encoder, self.decoder):
            if stack is not None:
                stack.embed_tokens = value  # type: ignore[assignment]

    def get_encoder(self, *args: object, **kwargs: object) -> nn.Module | None:
        """Return the bidirectional stack."""
        return self.encoder

    def get_decoder(self, *args: object, **kwargs: object) -> nn.Module | None:
        """Return the causal stack."""
        return self.decoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: ModelOutput | tuple[Tensor, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        **kwargs: object,
    ) -> ModelOutput:
        """Return the states of the last stack, (B, T, D); `cache` is the newer name of `past_key_values`."""
        past_key_values = past_key_values if cache is None else cache
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        if self.encoder is None or self.decoder is None:
            kwargs |= {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
            return self.main(input_ids, past_key_values=past_key_values, **kwargs)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds)
        states = encoder_outputs[0]
        out = self.decoder(
            decoder_input_ids,
            attention_mask=decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            encoder_hidden_states=states,
            encoder_attention_mask=attention_mask,
            **kwargs,
        )
        return Seq2SeqMoEModelOutput(
            last_hidden_state=out.last_hidden_state,
            past_key_values=cache_of(out),
            decoder_hidden_states=out.hidden_states,
            decoder_attentions=out.attentions,
            encoder_last_hidden_state=states,
            encoder_router_logits=getattr(encoder_outputs, "router_logits", None),
            decoder_router_logits=getattr(out, "router_logits", None),
        )
