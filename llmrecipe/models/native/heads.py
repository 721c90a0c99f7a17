"""Native transformers with an output head."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    ImageClassifierOutput,
    MaskedLMOutput,
    MoeCausalLMOutputWithPast,
    Seq2SeqLMOutput,
    Seq2SeqMoEModelOutput,
    Seq2SeqSequenceClassifierOutput,
    SequenceClassifierOutputWithPast,
)

from llmrecipe.models.kv_cache import cache_of
from llmrecipe.models.load_balance import auxiliary_loss, load_balancing_loss
from llmrecipe.models.native.config import NativeConfig
from llmrecipe.models.native.model import NativeModel, NativePreTrainedModel
from llmrecipe.models.native.parts.layer_norm import make_norm
from llmrecipe.models.native.parts.width_scaling import scaled_logits


def _expect(config: NativeConfig, kind: str, name: str) -> None:
    if config.kind != kind:
        raise ValueError(f"{name} needs kind: {kind}, not {config.kind}")


def _kept(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    return hidden[:, logits_to_keep]


class NativeForCausalLM(NativePreTrainedModel, GenerationMixin):
    """A decoder that predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: NativeConfig):
        _expect(config, "decoder", type(self).__name__)
        super().__init__(config)
        self.model = NativeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: object,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        """Return logits (B, T, V), or those of the last `logits_to_keep` positions, and the mean loss where labels are given.

        The loss of a mixture includes its load-balancing loss.

        Args:
            input_ids: (B, T), or `inputs_embeds` (B, T, D).
            cache: newer name of `past_key_values`.
            labels: (B, T); -100 marks positions without loss.
        """
        out = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = scaled_logits(self.lm_head(_kept(out.last_hidden_state, logits_to_keep)), self.config)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        shown = (logits, cache_of(out), out.hidden_states, out.attentions)
        router_logits = getattr(out, "router_logits", None)
        if not router_logits:
            return CausalLMOutputWithPast(loss, *shown)
        balance = None
        if loss is not None:
            balance = load_balancing_loss(router_logits, self.config.num_experts_per_tok, attention_mask)
            loss = loss + self.config.router_aux_loss_coef * balance
        return MoeCausalLMOutputWithPast(loss, balance, *shown, router_logits)


class NativeMaskedHead(nn.Module):
    """decoder(norm(act(dense x))): the decoder is tied to the embedding and has its own bias."""

    def __init__(self, config: NativeConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.norm = make_norm(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map states (..., D) to logits (..., V)."""
        return self.decoder(self.norm(self.act(self.dense(hidden))))


class NativeForMaskedLM(NativePreTrainedModel):
    """An encoder that predicts masked tokens."""

    _tied_weights_keys = {"lm_head.decoder.weight": "model.encoder.embed_tokens.weight"}

    def __init__(self, config: NativeConfig):
        _expect(config, "encoder", type(self).__name__)
        super().__init__(config)
        self.model = NativeModel(config)
        self.lm_head = NativeMaskedHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the module that maps states to vocabulary logits."""
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the module that maps states to vocabulary logits."""
        self.lm_head.decoder = new_embeddings

    def forward(self, input_ids: Tensor | None = None, labels: Tensor | None = None, **kwargs: object) -> MaskedLMOutput:
        """Return logits (B, T, V) for ids (B, T), and the mean loss over labels other than -100."""
        out = self.model(input_ids, **kwargs)
        logits = scaled_logits(self.lm_head(out.last_hidden_state), self.config)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
            balance = auxiliary_loss(self.config, out, cast("Tensor | None", kwargs.get("attention_mask")))
            loss = loss if balance is None else loss + balance
        return MaskedLMOutput(loss, logits, out.hidden_states, out.attentions)


class NativeForSeq2SeqLM(NativePreTrainedModel, GenerationMixin):
    """An encoder-decoder that predicts the target from the source."""

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}

    def __init__(self, config: NativeConfig):
        _expect(config, "encoder_decoder", type(self).__name__)
        super().__init__(config)
        self.model = NativeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_encoder(self, *args: object, **kwargs: object) -> nn.Module | None:
        """Return the bidirectional stack."""
        return self.model.encoder

    def get_decoder(self, *args: object, **kwargs: object) -> nn.Module | None:
        """Return the causal stack."""
        return self.model.decoder

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Shift labels (B, T) one position to the right after the start token; ignored positions become padding."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError("decoder_start_token_id and pad_token_id must be set")
        first = labels.new_full((labels.shape[0], 1), start)
        return torch.cat((first, labels[:, :-1]), 1).masked_fill(torch.cat((first, labels[:, :-1]), 1) == -100, pad)

    def _balance(self, out: Seq2SeqMoEModelOutput, mask: Tensor | None, decoder_mask: Tensor | None) -> Tensor | float:
        """Return the weighted load-balancing loss of both sides; zero without experts, or where the encoder ran before."""
        sides = ((out.encoder_router_logits, mask), (out.decoder_router_logits, decoder_mask))
        k, weight = self.config.num_experts_per_tok, self.config.router_aux_loss_coef
        return weight * sum(load_balancing_loss(logits, k, own) for logits, own in sides if logits)

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: object,
    ) -> Seq2SeqLMOutput:
        """Return logits (B, T, V) of the decoder for source ids (B, S), and the mean loss over labels other than -100."""
        if decoder_input_ids is None and labels is not None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        out = self.model(input_ids, decoder_input_ids=decoder_input_ids, **kwargs)
        logits = scaled_logits(self.lm_head(_kept(out.last_hidden_state, logits_to_keep)), self.config)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
            masks = [cast("Tensor | None", kwargs.get(name)) for name in ("attention_mask", "decoder_attention_mask")]
            loss = loss + self._balance(out, *masks)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache_of(out),
            decoder_hidden_states=out.decoder_hidden_states,
            encoder_last_hidden_state=out.encoder_last_hidden_state,
        )


class NativeForSequenceClassification(GenericForSequenceClassification, NativePreTrainedModel):
    """A linear classifier on the state of the last real token.

    Of an encoder-decoder, as BART and T5 do, both sides read the text: the encoder whole, and the decoder behind the start
    token, so that its state at the last real token has read all tokens before it there and every one by the encoder.
    """

    def __init__(self, config: NativeConfig):
        super().__init__(config)
        if config.is_encoder_decoder:
            del self.score
            self.classifier = nn.Linear(config.hidden_size, len(config.id2label or {}), bias=False)
            self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: object,
    ) -> SequenceClassifierOutputWithPast | Seq2SeqSequenceClassifierOutput:
        """Return logits (B, classes) for texts (B, T), and the loss where labels (B,) are given.

        Raises:
            ValueError: the config of an encoder-decoder has no decoder_start_token_id.
        """
        if not self.config.is_encoder_decoder:
            return super().forward(input_ids, attention_mask, inputs_embeds=inputs_embeds, labels=labels, **kwargs)
        if self.config.decoder_start_token_id is None:
            raise ValueError("decoder_start_token_id must be set")
        read = cast("Tensor", input_ids if inputs_embeds is None else inputs_embeds)
        pad = self.config.pad_token_id
        if attention_mask is None:
            attention_mask = read.new_ones(read.shape[:2], dtype=torch.long)
            if inputs_embeds is None and pad is not None:
                attention_mask = (read != pad).long()
        start = torch.tensor(self.config.decoder_start_token_id, device=read.device)
        if inputs_embeds is not None:
            start = self.get_input_embeddings()(start).to(read.dtype)
        decoder = "decoder_input_ids" if inputs_embeds is None else "decoder_inputs_embeds"
        out = self.model(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, decoder_attention_mask=attention_mask,
            use_cache=False, **{decoder: _behind_start(read, attention_mask, start)}, **kwargs,
        )  # fmt: skip
        places = torch.arange(read.shape[1], device=read.device)
        last = (places * attention_mask).argmax(-1)
        logits = self.classifier(out.last_hidden_state[torch.arange(len(last), device=read.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return Seq2SeqSequenceClassifierOutput(
            loss,
            logits,
            encoder_last_hidden_state=out.encoder_last_hidden_state,
            decoder_hidden_states=out.decoder_hidden_states,
        )


def _behind_start(read: Tensor, mask: Tensor, start: Tensor) -> Tensor:
    """Return ids (B, T) or embeddings (B, T, D) one place to the right, the start token before the first real one."""
    shifted = torch.cat((read[:, :1], read[:, :-1]), 1)
    first = (mask == 1) & (mask.cumsum(-1) == 1)
    return torch.where(first if read.dim() == 2 else first[..., None], start, shifted)


class NativeForTokenClassification(GenericForTokenClassification, NativePreTrainedModel):
    """A linear classifier on the state of each token."""


class NativeForQuestionAnswering(GenericForQuestionAnswering, NativePreTrainedModel):
    """Linear scores of each token as the first and as the last one of an answer."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.set_input_embeddings(value)


class NativeForImageClassification(NativePreTrainedModel):
    """A linear classifier on the last state of the class token of a vision model."""

    main_input_name = "pixel_values"

    def __init__(self, config: NativeConfig):
        _expect(config, "vision", type(self).__name__)
        super().__init__(config)
        self.model = NativeModel(config)
        self.classifier = nn.Linear(config.hidden_size, len(config.id2label or {}))
        self.post_init()

    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None, **kwargs: object
    ) -> ImageClassifierOutput:
        """Return logits (B, classes) for images (B, C, S, S), and the mean cross-entropy where labels (B,) are given."""
        out = self.model(pixel_values=pixel_values, **kwargs)
        logits = self.classifier(out.last_hidden_state[:, 0])
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.float(), labels)
            balance = auxiliary_loss(self.config, out)
            loss = loss if balance is None else loss + balance
        return ImageClassifierOutput(loss, logits, out.hidden_states, out.attentions)
