"""Model family: mbart."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.models.family import Family
from llmrecipe.models.part_names import BART, PartNames


@register
class MBart(Family):
    """mBART: BART with norms before and a final one."""

    model_types: ClassVar[tuple[str, ...]] = ("mbart",)
    parts: ClassVar[PartNames] = replace(BART, top=BART.top | {"norm.final": "layer_norm"}, pre_norm=True)
