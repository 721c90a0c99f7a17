"""PEFT adapter folders."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from llmrecipe.core.registry import register
from llmrecipe.interop.adapter_hub.hub_adapters import is_hub
from llmrecipe.interop.peft.importer import adapter_layer
from llmrecipe.runs.adapter_format import AdapterFormat
from llmrecipe.runs.delta import Layer


@register
class Peft(AdapterFormat):
    """Adapter folders of PEFT: LoRA, DoRA, AdaLoRA, IA3, prefix and prompt tuning, BEFT, LN tuning.

    `adapter_config.json` names the method and its scale, `adapter_model.safetensors` holds the tensors.
    """

    def recognizes(self, folder: Path) -> bool:
        """Return whether PEFT wrote the folder."""
        return (folder / "adapter_config.json").is_file() and not is_hub(folder)

    def layer(self, folder: Path, model: nn.Module, weight: float) -> Layer:
        """Return the adapter as a wrapper of this package with its tensors.

        Raises:
            ModelError: it does not fit the model, or has no counterpart here.
        """
        return adapter_layer(folder, model, weight)
