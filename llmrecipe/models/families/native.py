"""Model family: native."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.models.family import Family
from llmrecipe.models.part_names import ATTENTION, GATED, PartNames


@register
class Native(Family):
    """The transformer of this package."""

    model_types: ClassVar[tuple[str, ...]] = ("llmrecipe_native",)
    parts: ClassVar[PartNames] = PartNames(
        stacks={"encoder": "encoder.layers", "decoder": "decoder.layers"},
        layer=ATTENTION
        | GATED
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
        top={"norm.final": "norm", "embed.position": "positions"},
        pre_norm="pre_norm",
    )
