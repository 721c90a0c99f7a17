"""Model family: opt."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.models.family import Family
from llmrecipe.models.part_names import OUT_PROJECTION, TWO_LINEARS, PartNames


@register
class Opt(Family):
    """OPT: learned positions, norms before or after as its config says."""

    model_types: ClassVar[tuple[str, ...]] = ("opt",)
    parts: ClassVar[PartNames] = PartNames(
        stacks={"decoder": "layers"},
        layer=OUT_PROJECTION | TWO_LINEARS,
        top={"norm.final": "final_layer_norm", "embed.position": "embed_positions"},
        pre_norm="do_layer_norm_before",
    )
