"""Model family: mixtral."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.models.family import Family
from llmrecipe.models.part_names import LLAMA, MIXTURE, PartNames


@register
class Mixtral(Family):
    """Mixtral and the families built like Llama with experts."""

    model_types: ClassVar[tuple[str, ...]] = (
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "olmoe",
    )
    parts: ClassVar[PartNames] = replace(LLAMA, layer=LLAMA.layer | MIXTURE)
