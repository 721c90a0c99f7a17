"""Model family: deepseek."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.models.family import Family
from llmrecipe.models.part_names import GATED, LATENT, LLAMA, MIXTURE, NORMS, PartNames


@register
class DeepSeek(Family):
    """DeepSeek 2 and 3: latent attention and experts."""

    model_types: ClassVar[tuple[str, ...]] = (
        "deepseek_v2",
        "deepseek_v3",
    )
    parts: ClassVar[PartNames] = replace(LLAMA, layer=LATENT | GATED | NORMS | MIXTURE, fused={"attn.kv": "latent"})
