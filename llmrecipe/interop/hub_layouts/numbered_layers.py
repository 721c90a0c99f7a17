"""Hub layout: numbered layers."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.interop.adapter_hub.hub_layout import HubLayout


@register
class NumberedLayers(HubLayout):
    """Adapters are in the numbered layers of a block, where the decoder's second is cross-attention: T5."""

    model_types: ClassVar[tuple[str, ...]] = ("t5",)
    places: ClassVar[dict[str, str]] = {"attn": "layer.0", "ffn": "layer.1", "decoder:ffn": "layer.2"}
