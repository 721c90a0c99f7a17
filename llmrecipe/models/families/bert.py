"""Model family: bert."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.models.family import Family
from llmrecipe.models.part_names import PartNames


@register
class Bert(Family):
    """BERT and the encoders that name their parts alike."""

    model_types: ClassVar[tuple[str, ...]] = (
        "bert",
        "roberta",
        "xlm-roberta",
        "camembert",
        "electra",
    )
    parts: ClassVar[PartNames] = PartNames(
        stacks={"encoder": "encoder.layer"},
        layer={
            "attn": "attention.self",
            "attn.q": "attention.self.query",
            "attn.k": "attention.self.key",
            "attn.v": "attention.self.value",
            "attn.o": "attention.output.dense",
            "cross": "crossattention.self",
            "cross.q": "crossattention.self.query",
            "cross.k": "crossattention.self.key",
            "cross.v": "crossattention.self.value",
            "cross.o": "crossattention.output.dense",
            "mlp.up": "intermediate.dense",
            "mlp.down": "output.dense",
            "norm.attn": "attention.output.LayerNorm",
            "norm.cross": "crossattention.output.LayerNorm",
            "norm.mlp": "output.LayerNorm",
        },
        top={
            "embed.position": "^embeddings.position_embeddings",
            "embed.type": "^embeddings.token_type_embeddings",
            "norm.embed": "^embeddings.LayerNorm",
        },
        pre_norm=False,
        causal=False,
    )
