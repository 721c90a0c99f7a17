"""Adapter folders of adapter-hub's `adapters` library."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.registry import register
from llmrecipe.interop.adapter_hub.hub_adapters import is_hub, read_hub_adapter
from llmrecipe.runs.adapter_format import AdapterFormat
from llmrecipe.runs.delta import Layer


@register
class AdapterHub(AdapterFormat):
    """Bottleneck adapters as adapter-hub's `adapters` library stores them."""

    def recognizes(self, folder: Path) -> bool:
        """Return whether the `adapters` library wrote the folder."""
        return is_hub(folder)

    def layer(self, folder: Path, model: nn.Module, weight: float) -> Layer:
        """Return the adapter as a serial or parallel adapter of this package.

        Raises:
            ModelError: it does not fit the model, or is taken with a weight.
        """
        if weight != 1.0:
            raise ModelError(f"{folder}: a bottleneck adapter adds to no weight, so it cannot be taken {weight:g} times")
        return read_hub_adapter(folder, model)
