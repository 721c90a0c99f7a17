"""Model family: phi."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.models.family import Family
from llmrecipe.models.part_names import ATTENTION, PartNames


@register
class Phi(Family):
    """Phi 1 and 2: attention and feed-forward in parallel."""

    model_types: ClassVar[tuple[str, ...]] = ("phi",)
    parts: ClassVar[PartNames] = PartNames(
        stacks={"decoder": "layers"},
        layer=ATTENTION
        | {
            "attn.o": "self_attn.dense",
            "norm.q": "self_attn.q_layernorm",
            "norm.k": "self_attn.k_layernorm",
            "mlp": "mlp",
            "mlp.up": "mlp.fc1",
            "mlp.down": "mlp.fc2",
            "norm.attn": "input_layernorm",
        },
        top={"norm.final": "final_layernorm"},
        parallel=True,
    )
