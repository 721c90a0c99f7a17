"""Model family: gpt2."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.models.family import Family
from llmrecipe.models.part_names import PartNames


@register
class Gpt2(Family):
    """GPT-2: one fused projection, learned positions."""

    model_types: ClassVar[tuple[str, ...]] = ("gpt2",)
    parts: ClassVar[PartNames] = PartNames(
        stacks={"decoder": "h"},
        layer={
            "attn": "attn",
            "attn.qkv": "attn.c_attn",
            "attn.o": "attn.c_proj",
            "mlp": "mlp",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
            "norm.attn": "ln_1",
            "norm.mlp": "ln_2",
        },
        top={"norm.final": "ln_f", "embed.position": "wpe"},
        fused={"attn.qkv": "blocks"},
    )
