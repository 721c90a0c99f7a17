"""The interface of a model family: which models it is for, and what their parts are called."""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass as pydantic_dataclass

from llmrecipe.core import registry
from llmrecipe.core.errors import ModelError
from llmrecipe.core.registry import CONFIG
from llmrecipe.models.part_names import PartNames


@pydantic_dataclass(config=CONFIG, kw_only=True)
class Family:
    """Models that name their parts alike; the parts of models of no family are inferred from the names of their modules."""

    group: ClassVar[str] = "family"
    model_types: ClassVar[tuple[str, ...]]
    """Values of `config.model_type` of the text model."""
    parts: ClassVar[PartNames]
    documents: ClassVar[tuple[str, ...]] = ()
    """Source files whose docstrings explain the parts, relative to the family's own file; `show` prints them."""


def part_names_of(model_type: str) -> PartNames | None:
    """Return what the parts of models of a type are called, or None where no family is for them.

    Raises:
        ModelError: several families say they are.
    """
    found = [n for n in registry.names("family") if model_type in (registry.spec("family", n).facts.get("model_types") or ())]
    if len(found) > 1:
        files = " and ".join(str(registry.spec("family", name).path) for name in found)
        raise ModelError(f"model type {model_type} belongs to several families: {files}; a model type has one")
    if not found:
        return None
    family: type[Family] = registry.load_class("family", found[0])
    return family.parts
