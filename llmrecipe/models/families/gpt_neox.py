"""Model family: gpt_neox."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.models.family import Family
from llmrecipe.models.part_names import NORMS, PartNames


@register
class GptNeox(Family):
    """GPT-NeoX and Pythia: queries, keys and values fused head by head."""

    model_types: ClassVar[tuple[str, ...]] = ("gpt_neox",)
    parts: ClassVar[PartNames] = PartNames(
        stacks={"decoder": "layers"},
        layer={
            "attn": "attention",
            "attn.qkv": "attention.query_key_value",
            "attn.o": "attention.dense",
            "mlp": "mlp",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
        }
        | NORMS,
        top={"norm.final": "final_layer_norm"},
        fused={"attn.qkv": "heads"},
        parallel="use_parallel_residual",
    )
