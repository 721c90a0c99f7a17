"""Model family: gemma2."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.models.family import Family
from llmrecipe.models.part_names import ATTENTION, GATED, LLAMA, SANDWICH, PartNames


@register
class Gemma2(Family):
    """Gemma 2 and 3: norms before and after attention and feed-forward."""

    model_types: ClassVar[tuple[str, ...]] = (
        "gemma2",
        "gemma3_text",
    )
    parts: ClassVar[PartNames] = replace(LLAMA, layer=ATTENTION | GATED | SANDWICH)
