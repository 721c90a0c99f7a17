"""Which methods PEFT has in a form of its own, by method: what writes each in PEFT's layout.

A method that is a low-rank change of weights (LoRA, DoRA, DyLoRA, ...) needs no entry: `peft.branches_of` reads its branches.
A plugin adds its own method:

    from llmrecipe.plugin import peft_converter

    @peft_converter("my_method")
    def my_method_adapter(wrapper, model): ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from llmrecipe.core import registry
from llmrecipe.core.errors import LlmRecipeError
from llmrecipe.interop.peft.adalora import adalora_adapter
from llmrecipe.interop.peft.additive_adapters import ia3_adapter, prefix_adapter, prompt_adapter
from llmrecipe.interop.peft.bias_adapters import bias_adapter
from llmrecipe.interop.peft.layout import Adapter
from llmrecipe.methods._base.method import Wrapper
from llmrecipe.runs.delta import kind_name

Converter = Callable[[Any, nn.Module], Adapter | None]
"""(wrapper, model) -> the adapter, or None where PEFT would compute something else with it."""

CONVERTERS: dict[str, Converter] = {
    "adalora": adalora_adapter,
    "bitfit": bias_adapter,
    "ia3": ia3_adapter,
    "p_tuning_v2": prefix_adapter,
    "prefix_tuning": prefix_adapter,
    "prompt_tuning": prompt_adapter,
}


def peft_converter(kind: str) -> Callable[[Converter], Converter]:
    """Register a converter for the method `kind`.

    Raises:
        LlmRecipeError: the method has one already.
    """

    def add(converter: Converter) -> Converter:
        if kind in CONVERTERS:
            raise LlmRecipeError(f"peft converter '{kind}' is registered twice")
        CONVERTERS[kind] = converter
        return converter

    return add


def native_adapter(wrapper: Wrapper, model: nn.Module) -> Adapter | None:
    """Return the method in PEFT's own form; None where it has none, or where PEFT would compute something else."""
    registry.import_marked("@peft_converter")
    converter = CONVERTERS.get(kind_name(wrapper))
    return None if converter is None else converter(wrapper, model)
