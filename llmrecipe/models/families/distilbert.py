"""Model family: distilbert."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.models.family import Family
from llmrecipe.models.part_names import PartNames


@register
class DistilBert(Family):
    """DistilBERT."""

    model_types: ClassVar[tuple[str, ...]] = ("distilbert",)
    parts: ClassVar[PartNames] = PartNames(
        stacks={"encoder": "transformer.layer"},
        layer={
            "attn": "attention",
            "attn.q": "attention.q_lin",
            "attn.k": "attention.k_lin",
            "attn.v": "attention.v_lin",
            "attn.o": "attention.out_lin",
            "mlp": "ffn",
            "mlp.up": "ffn.lin1",
            "mlp.down": "ffn.lin2",
            "norm.attn": "sa_layer_norm",
            "norm.mlp": "output_layer_norm",
        },
        top={"embed.position": "^embeddings.position_embeddings", "norm.embed": "^embeddings.LayerNorm"},
        pre_norm=False,
        causal=False,
    )
