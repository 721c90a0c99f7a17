"""Hub layout: inside outputs."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.interop.adapter_hub.hub_layout import HubLayout


@register
class InsideOutputs(HubLayout):
    """Adapters are inside the output module of each sublayer: BERT, RoBERTa."""

    model_types: ClassVar[tuple[str, ...]] = ("bert", "roberta")
    places: ClassVar[dict[str, str]] = {"attn": "attention.output", "ffn": "output"}
