"""Hub layout: one adapter module for each sublayer."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.interop.adapter_hub.hub_layout import HubLayout


@register
class PerSublayer(HubLayout):
    """Adapters are modules of the block, one for each sublayer: Llama, GPT-2, DistilBERT, BART."""

    model_types: ClassVar[tuple[str, ...]] = ("llama", "mistral", "gpt2", "distilbert", "bart")
    places: ClassVar[dict[str, str]] = {"attn": "attention_adapters", "ffn": "output_adapters"}
