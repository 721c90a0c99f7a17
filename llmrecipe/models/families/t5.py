"""Model family: t5."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.models.family import Family
from llmrecipe.models.part_names import PartNames


@register
class T5(Family):
    """T5 and mT5: encoder and decoder with relative positions."""

    model_types: ClassVar[tuple[str, ...]] = (
        "t5",
        "mt5",
    )
    parts: ClassVar[PartNames] = PartNames(
        stacks={"encoder": "encoder.block", "decoder": "decoder.block"},
        layer={
            "attn": "layer.0.SelfAttention",
            "attn.q": "layer.0.SelfAttention.q",
            "attn.k": "layer.0.SelfAttention.k",
            "attn.v": "layer.0.SelfAttention.v",
            "attn.o": "layer.0.SelfAttention.o",
            "cross": "layer.1.EncDecAttention",
            "cross.q": "layer.1.EncDecAttention.q",
            "cross.k": "layer.1.EncDecAttention.k",
            "cross.v": "layer.1.EncDecAttention.v",
            "cross.o": "layer.1.EncDecAttention.o",
            "mlp": "layer.1.DenseReluDense | layer.2.DenseReluDense",
            "mlp.gate": "layer.1.DenseReluDense.wi_0 | layer.2.DenseReluDense.wi_0",
            "mlp.up": "layer.1.DenseReluDense.wi | layer.2.DenseReluDense.wi"
            " | layer.1.DenseReluDense.wi_1 | layer.2.DenseReluDense.wi_1",
            "mlp.down": "layer.1.DenseReluDense.wo | layer.2.DenseReluDense.wo",
            "embed.relative": "layer.0.SelfAttention.relative_attention_bias",
            "norm.attn": "layer.0.layer_norm",
            "norm.mlp": "layer.2.layer_norm | layer.1.layer_norm",
            "decoder:norm.cross": "layer.1.layer_norm",
        },
        top={"norm.final": "final_layer_norm"},
    )
