"""Model family: phi3."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.models.family import Family
from llmrecipe.models.part_names import NORMS, PartNames


@register
class Phi3(Family):
    """Phi 3: fused projections of attention and of the gate."""

    model_types: ClassVar[tuple[str, ...]] = ("phi3",)
    parts: ClassVar[PartNames] = PartNames(
        stacks={"decoder": "layers"},
        layer={
            "attn": "self_attn",
            "attn.qkv": "self_attn.qkv_proj",
            "attn.o": "self_attn.o_proj",
            "mlp": "mlp",
            "mlp.gate_up": "mlp.gate_up_proj",
            "mlp.down": "mlp.down_proj",
        }
        | NORMS,
        top={"norm.final": "norm"},
        fused={"attn.qkv": "blocks", "mlp.gate_up": "blocks"},
    )
