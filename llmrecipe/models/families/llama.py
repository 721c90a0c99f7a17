"""Model family: llama."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.models.family import Family
from llmrecipe.models.part_names import LLAMA, PartNames


@register
class Llama(Family):
    """Llama and the families that name their parts alike."""

    model_types: ClassVar[tuple[str, ...]] = (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "smollm3",
        "gemma",
    )
    parts: ClassVar[PartNames] = LLAMA
