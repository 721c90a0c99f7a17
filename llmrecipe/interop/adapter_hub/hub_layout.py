"""The interface of a hub layout: where adapter-hub's library keeps the adapters of a model family."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass as pydantic_dataclass

from llmrecipe.core import registry
from llmrecipe.core.errors import ModelError
from llmrecipe.core.registry import CONFIG


@pydantic_dataclass(config=CONFIG, kw_only=True)
class HubLayout:
    """Model types whose adapters the library keeps at the same places."""

    group: ClassVar[str] = "hub_layout"
    model_types: ClassVar[tuple[str, ...]]
    """Values of `config.model_type`."""
    places: ClassVar[dict[str, str]]
    """Sublayer (`attn`, `ffn`, or one of them after `encoder:` or `decoder:`) -> path of its adapters, below the block."""


def hub_place(model_type: str, side: str, part: str) -> str:
    """Return where the library keeps the adapters of a sublayer, below its block.

    Args:
        side: encoder or decoder.
        part: attn or ffn.

    Raises:
        ModelError: no layout, or more than one, is for models of that type.
    """
    every = {name: registry.spec("hub_layout", name).facts.get("model_types") or () for name in registry.names("hub_layout")}
    found = [name for name, types in every.items() if model_type in types]
    if not found:
        known = ", ".join(sorted(t for types in every.values() for t in types))
        raise ModelError(f"adapter-hub's names for {model_type} are not known here ({known} are)")
    if len(found) > 1:
        files = " and ".join(str(registry.spec("hub_layout", name).path) for name in found)
        raise ModelError(f"model type {model_type} belongs to several hub layouts: {files}; a model type has one")
    layout: type[HubLayout] = registry.load_class("hub_layout", found[0])
    return layout.places.get(f"{side}:{part}", layout.places[part])
