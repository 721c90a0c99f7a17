"""Model family: bart."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.models.family import Family
from llmrecipe.models.part_names import BART, PartNames


@register
class Bart(Family):
    """BART: encoder and decoder, norms after."""

    model_types: ClassVar[tuple[str, ...]] = ("bart",)
    parts: ClassVar[PartNames] = BART
