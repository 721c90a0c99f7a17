"""The shape of a native transformer."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

KINDS = ("decoder", "encoder", "encoder_decoder", "vision")
POSITIONS = ("rotary", "learned", "sinusoidal", "relative", "none")
NORMS = ("rmsnorm", "layernorm")


@strict
class NativeConfig(PreTrainedConfig):
    """Configuration of a native transformer.

    The defaults are those of a Llama; `norm: layernorm, positions: learned, gated: false, bias: true, hidden_act: gelu_new`
    is a GPT-2; `kind: encoder, pre_norm: false, embed_norm: true` a BERT; `kind: encoder_decoder, positions: relative,
    gated: false, hidden_act: relu` a T5, and with `scale_decoder_outputs: false, gated: true, hidden_act: gelu_new` a T5 1.1;
    `qk_norm: true` a Qwen3; `num_experts: 8` a Mixtral; `kind: vision` with GPT-2's norm, positions and feed-forward a ViT.

    Raises:
        ValueError: sizes or names that do not fit together.
    """

    model_type = "llmrecipe_native"
    keys_to_ignore_at_inference = ["past_key_values"]

    kind: str = "decoder"
    """decoder (causal), encoder (bidirectional), encoder_decoder, or vision (an encoder that reads patches of images)."""
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
    qk_norm: bool = False
    """Norm queries and keys of each head."""
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
    scale_decoder_outputs: bool | None = None
    """Divide the decoder's states by sqrt(hidden_size) before the output head; default: as T5 does, with relative positions and
    a tied head."""
    type_vocab_size: int = 0
    """Segment embeddings, for sentence pairs."""
    hidden_act: str = "silu"
    gated: bool = True
    """down(act(gate x) * up x) instead of down(act(up x))."""
    bias: bool = False
    """Biases on linear layers."""
    num_experts: int = 0
    """Experts of a mixture in place of each feed-forward; 0 for none."""
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    """Width inside an expert; default: intermediate_size."""
    norm_topk_prob: bool = True
    """Let the weights of a token's experts sum to 1."""
    num_shared_experts: int = 0
    """Experts that every token uses besides its own."""
    shared_expert_gate: bool = False
    """Multiply the shared experts by a learned share of each token."""
    output_router_logits: bool = True
    """Add the load-balancing loss of a mixture to the training loss."""
    router_aux_loss_coef: float = 0.01
    """Weight of the load-balancing loss."""
    image_size: int = 32
    """Height and width of images, in pixels (kind: vision)."""
    patch_size: int = 4
    num_channels: int = 3
    dropout: float = 0.0
    initializer_range: float = 0.02
    mup_base_width: int | None = None
    """Width at which the learning rate was chosen: scale the start, the rates and the outputs of this one to it (muP)."""
    mup_base_head_dim: int | None = None
    """Size of a head at that width; default: with as many heads as here."""
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs: object) -> None:
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
        self._check_mixture()
        self._check_width_scaling()
        self._fill_in_output_scale()
        if self.kind == "vision":
            if self.image_size % self.patch_size:
                raise ValueError(f"image_size ({self.image_size}) is no multiple of patch_size ({self.patch_size})")
            self.max_position_embeddings = 1 + (self.image_size // self.patch_size) ** 2
        super().__post_init__(**kwargs)
        self.is_encoder_decoder = self.kind == "encoder_decoder"

    def _check_mixture(self) -> None:
        # Transformers records what a config requires, and a dense model has nothing to record.
        self.output_router_logits = self.output_router_logits and self.num_experts > 0
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be from 1 to num_experts ({self.num_experts})"
            )
        for name in ("num_shared_experts", "shared_expert_gate"):
            if getattr(self, name) and not self.num_experts:
                raise ValueError(f"{name}: only a mixture has shared experts; set num_experts")
        if self.shared_expert_gate and not self.num_shared_experts:
            raise ValueError("shared_expert_gate: there are no shared experts; set num_shared_experts")

    def _check_width_scaling(self) -> None:
        for name in ("mup_base_width", "mup_base_head_dim"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        if self.mup_base_head_dim is not None and self.mup_base_width is None:
            raise ValueError("mup_base_head_dim: only with mup_base_width")
        if self.mup_base_width is not None and self.scale_embedding:
            raise ValueError("scale_embedding: multiplies embeddings by more in wider models, which mup_base_width keeps alike")

    def _fill_in_output_scale(self) -> None:
        if self.scale_decoder_outputs and self.kind != "encoder_decoder":
            raise ValueError("scale_decoder_outputs: only kind: encoder_decoder has them")
        if self.scale_decoder_outputs is None:
            # A saved config leaves out what a plain decoder has: where it lacks the key, its model divides by nothing.
            relative = self.kind == "encoder_decoder" and self.positions == "relative"
            self.scale_decoder_outputs = relative and self.tie_word_embeddings and self.transformers_version is None

    def logit_divisor(self) -> float:
        """Return what logits are divided by: m, and where outputs are scaled sqrt(D_0), D_0 = D without a base."""
        base = self.mup_base_width or self.hidden_size
        return self.width_ratio() * (base**0.5 if self.scale_decoder_outputs else 1.0)

    def width_ratio(self) -> float:
        """Return m, hidden_size over `mup_base_width`; 1 without it."""
        return 1.0 if self.mup_base_width is None else self.hidden_size / self.mup_base_width

    def sizes(self) -> tuple[int, int, int]:
        """Return (E size of a head, G heads that hold keys and values, F width of the feed-forward), defaults filled in."""
        assert self.head_dim is not None and self.num_key_value_heads is not None and self.intermediate_size is not None
        return self.head_dim, self.num_key_value_heads, self.intermediate_size

    def expert_width(self) -> int:
        """Return the width inside one expert."""
        return self.moe_intermediate_size or self.sizes()[2]

    def parameter_count(self, head: bool = True) -> int:
        """Return the number of parameters of the model of this kind in closed form.

        Embedding V D (patches: C p^2 D + 2 D), attention D E (2 H + 2 G), feed-forward 2 D F or 3 D F, norms D each (2 D with a
        bias), biases, and N experts of 2 D F_e or 3 D F_e with a router N D.

        Args:
            head: with the output head: V D more where it is not tied; the classifier of images.
        """
        d, layers = self.hidden_size, self.num_hidden_layers
        norm = d if self.norm == "rmsnorm" else 2 * d
        attention, forward = self._attention_count(), self._forward_count()
        sides = 2 if self.kind == "encoder_decoder" else 1
        stack = layers * (attention + forward + 2 * norm) + norm * (self.pre_norm + self.embed_norm)
        stack += self.max_position_embeddings * d if self.positions == "learned" else 0
        stack += self.relative_buckets * self.num_attention_heads if self.positions == "relative" else 0
        if self.kind == "vision":
            patches = self.num_channels * self.patch_size**2 * d + 2 * d
            return patches + stack + ((d + 1) * len(self.id2label or {}) if head else 0)
        total = self.vocab_size * d + sides * stack + self.type_vocab_size * d * (1 if sides == 1 else 0)
        if sides == 2:
            total += layers * (attention + norm)
        if head:
            total += 0 if self.tie_word_embeddings else self.vocab_size * d
            if self.kind == "encoder":
                total += d * d + d + norm + self.vocab_size
        return total

    def _attention_count(self) -> int:
        d, (size, groups, _) = self.hidden_size, self.sizes()
        own, shared = self.num_attention_heads * size, groups * size
        normed = 2 * size * (1 if self.norm == "rmsnorm" else 2) if self.qk_norm else 0
        return 2 * d * own + 2 * d * shared + (own + 2 * shared + d if self.bias else 0) + normed

    def _forward_count(self) -> int:
        d, matrices = self.hidden_size, 3 if self.gated else 2

        def dense(width: int) -> int:
            return matrices * d * width + (width * (matrices - 1) + d if self.bias else 0)

        if not self.num_experts:
            return dense(self.sizes()[2])
        shared = dense(self.num_shared_experts * self.expert_width()) if self.num_shared_experts else 0
        experts = self.num_experts * (matrices * d * self.expert_width() + d)
        return experts + shared + (d if self.shared_expert_gate else 0)
