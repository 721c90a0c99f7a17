"""Embedding: X = M[ids] (* sqrt(D) with `scale_embedding`) + positions + segments, X in R^(B, T, D).

M in R^(V, D) has one row a token; the row of the padding token starts at zero. Positions are added here where they are
`sinusoidal` or `learned`, segments (sentence A or B) where `type_vocab_size` is above 0; `embed_norm` norms the sum.
With `tie_word_embeddings` the output head is M itself: logits = h M^T; an encoder-decoder shares M between its two sides, and
with `scale_decoder_outputs` (T5's) has logits = h M^T / sqrt(D).

Config: vocab_size, scale_embedding, type_vocab_size, embed_norm, tie_word_embeddings, scale_decoder_outputs.
Papers: Attention Is All You Need (arXiv 1706.03762), section 3.4; T5 (1910.10683).
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from llmrecipe.models.native.config import NativeConfig


def token_embedding(config: NativeConfig) -> nn.Embedding:
    """Return the table M, (V, D)."""
    return nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)


def segment_embedding(config: NativeConfig) -> nn.Embedding | None:
    """Return the table of segments, or None where there are none; the sides of an encoder-decoder need no such mark."""
    if not config.type_vocab_size or config.is_encoder_decoder:
        return None
    return nn.Embedding(config.type_vocab_size, config.hidden_size)


def scaled(x: Tensor, config: NativeConfig) -> Tensor:
    """Return embeddings (B, T, D) in the scale that the config states."""
    return x * math.sqrt(config.hidden_size) if config.scale_embedding else x
