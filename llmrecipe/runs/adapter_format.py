"""The interface of an adapter format: how a folder that another library wrote becomes a layer on a model."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import nn

from llmrecipe.core import registry
from llmrecipe.core.errors import ModelError
from llmrecipe.core.registry import CONFIG
from llmrecipe.runs.delta import Layer


@pydantic_dataclass(config=CONFIG, kw_only=True)
class AdapterFormat:
    """A library's layout of an adapter folder."""

    group: ClassVar[str] = "adapter_format"

    def recognizes(self, folder: Path) -> bool:
        """Return whether the folder is of this format."""
        raise NotImplementedError

    def layer(self, folder: Path, model: nn.Module, weight: float) -> Layer:
        """Return the adapter as a layer that can be mounted on a model.

        Args:
            weight: multiplies the adapter's change.

        Raises:
            ModelError: the adapter does not fit the model, or cannot be expressed here; the message says what and why.
        """
        raise NotImplementedError


def read_adapter(folder: str | Path, model: nn.Module, weight: float = 1.0) -> Layer:
    """Return an adapter folder of any registered format as a layer.

    Raises:
        ModelError: no format recognizes the folder, or its format refuses it.
    """
    names = registry.names("adapter_format")
    for name in names:
        found: AdapterFormat = registry.load_class("adapter_format", name)()
        if found.recognizes(Path(folder)):
            return found.layer(Path(folder), model, weight)
    raise ModelError(f"{folder}: not an adapter folder of a known format ({', '.join(names)})")
