"""The shape of a native transformer."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

KINDS = ("decoder", "encoder", "encoder_decoder")
POSITIONS = ("rotary", "learned", "sinusoidal", "relative", "none")
NORMS = ("rmsnorm", "layernorm")


@strict
class NativeConfig(PreTrainedConfig):
    """Configuration of a native transformer.

    The defaults are those of a Llama; `norm: layernorm, positions: learned, gated: false, bias: true, hidden_act: gelu_new`
    is a GPT-2; `kind: encoder, pre_norm: false, embed_norm: true` a BERT; `kind: encoder_decoder, positions: relative` a T5.

    Raises:
        ValueError: sizes or names that do not fit together.
    """

    model_type = "llmrecipe_native"
    keys_to_ignore_at_inference = ["past_key_values"]

    kind: str = "decoder"
    """decoder (causal), encoder (bidirectional) or encoder_decoder."""
    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int | None = None
    """Width inside the feed-forward; default: 4 x hidden_size, or 8/3 x for a gated one."""
    num_hidden_layers: int = 4
    """Blocks on each side."""
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    """Number of key/value heads; fewer than num_attention_heads is grouped-query attention."""
    head_dim: int | None = None
    max_position_embeddings: int = 1024
    positions: str = "rotary"
    """rotary, learned, sinusoidal, relative (bucketed biases on the scores, which are then not scaled) or none."""
    rope_theta: float = 10000.0
    relative_buckets: int = 32
    relative_distance: int = 128
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    pre_norm: bool = True
    """Norm before attention and feed-forward and once at the end; otherwise after each residual sum."""
    embed_norm: bool = False
    """Norm the sum of embeddings."""
    scale_embedding: bool = False
    """Multiply token embeddings by sqrt(hidden_size), as the original transformer does."""
    type_vocab_size: int = 0
    """Segment embeddings, for sentence pairs."""
    hidden_act: str = "silu"
    gated: bool = True
    """down(act(gate x) * up x) instead of down(act(up x))."""
    bias: bool = False
    """Biases on linear layers."""
    dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, value, allowed in (
            ("kind", self.kind, KINDS),
            ("positions", self.positions, POSITIONS),
            ("norm", self.norm, NORMS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: '{value}' is not one of {', '.join(allowed)}")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads ({self.num_attention_heads}) is no multiple of {self.num_key_value_heads}")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(f"hidden_size ({self.hidden_size}) is no multiple of {self.num_attention_heads} heads")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even for rotary positions")
        if self.intermediate_size is None:
            wide = 8 * self.hidden_size / 3 if self.gated else 4 * self.hidden_size
            self.intermediate_size = 8 * round(wide / 8)
        super().__post_init__(**kwargs)
        self.is_encoder_decoder = self.kind == "encoder_decoder"

    def sizes(self) -> tuple[int, int, int]:
        """Return (E size of a head, G heads that hold keys and values, F width of the feed-forward), defaults filled in."""
        assert self.head_dim is not None and self.num_key_value_heads is not None and self.intermediate_size is not None
        return self.head_dim, self.num_key_value_heads, self.intermediate_size

    def parameter_count(self, head: bool = True) -> int:
        """Return the number of parameters of the language model of this kind in closed form.

        Embedding V D, attention D E (2 H + 2 G), feed-forward 2 D F or 3 D F, norms D each (2 D with a bias), and biases.

        Args:
            head: with the output head (V D more where it is not tied).
        """
        d, layers = self.hidden_size, self.num_hidden_layers
        size, groups, f = self.sizes()
        own, shared = self.num_attention_heads * size, groups * size
        norm = d if self.norm == "rmsnorm" else 2 * d
        attention = 2 * d * own + 2 * d * shared + (own + 2 * shared + d if self.bias else 0)
        forward = (3 if self.gated else 2) * d * f + ((f * (2 if self.gated else 1) + d) if self.bias else 0)
        sides = 2 if self.kind == "encoder_decoder" else 1
        block = attention + forward + 2 * norm
        stack = layers * block + (norm if self.pre_norm else 0) + (norm if self.embed_norm else 0)
        stack += self.max_position_embeddings * d if self.positions == "learned" else 0
        stack += self.relative_buckets * self.num_attention_heads if self.positions == "relative" else 0
        total = self.vocab_size * d + sides * stack + self.type_vocab_size * d * (1 if sides == 1 else 0)
        if sides == 2:
            total += layers * (attention + norm)
        if head:
            total += 0 if self.tie_word_embeddings else self.vocab_size * d
            if self.kind == "encoder":
                total += d * d + d + norm + self.vocab_size
        return total
