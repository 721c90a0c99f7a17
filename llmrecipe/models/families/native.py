"""Model family: native."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.models.family import Family
from llmrecipe.models.part_names import ATTENTION, GATED, MIXTURE, PartNames


@register
class Native(Family):
    """The transformer of this package: decoder, encoder, encoder-decoder or vision, put together from parts that YAML chooses.

    `model=native` builds one from fresh weights; every value of `model.config` named below is a key of the recipe, as in
    `model=native model.config.positions=learned model.config.norm=layernorm`. It is a Transformers model (generate, save,
    from_pretrained, Auto classes), and `export --to merged` writes it as a plain Llama, Qwen3 or Mixtral where its parts are
    theirs.

    Letters: B rows, T tokens, D width (hidden_size), H heads, G key/value heads, E head size, F feed-forward width, V tokens of
    the vocabulary.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llmrecipe_native",)
    documents: ClassVar[tuple[str, ...]] = (
        "../native/parts/embedding.py",
        "../native/parts/patch_embedding.py",
        "../native/parts/positional_encoding.py",
        "../native/parts/self_attention.py",
        "../native/parts/multi_head_attention.py",
        "../native/parts/feed_forward.py",
        "../native/parts/mixture_of_experts.py",
        "../native/parts/layer_norm.py",
        "../native/parts/add_norm.py",
        "../native/parts/width_scaling.py",
    )
    parts: ClassVar[PartNames] = PartNames(
        stacks={"encoder": "encoder.layers", "decoder": "decoder.layers"},
        layer=ATTENTION
        | GATED
        | MIXTURE
        | {
            "norm.attn": "norm_attn",
            "norm.mlp": "norm_mlp",
            "cross": "cross_attn",
            "cross.q": "cross_attn.q_proj",
            "cross.k": "cross_attn.k_proj",
            "cross.v": "cross_attn.v_proj",
            "cross.o": "cross_attn.o_proj",
            "norm.cross": "norm_cross",
        },
        top={"norm.final": "norm", "embed.position": "positions", "embed.type": "types", "norm.embed": "embed_norm"},
        pre_norm="pre_norm",
    )
