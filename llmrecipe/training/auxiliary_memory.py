"""Memory of what a run holds besides the policy: teacher, reward models, judges, and the policy of step 0."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from llmrecipe.core.errors import UserError
from llmrecipe.methods._base.stack import Stack
from llmrecipe.models.load import skeleton
from llmrecipe.recipe.schema import ModelSection
from llmrecipe.runs import base_storage, delta
from llmrecipe.runs.open_model import imported, resolve_section
from llmrecipe.training.memory_estimate import weight_bytes


def auxiliary_bytes(sections: Iterable[ModelSection], device: str) -> tuple[int, list[str]]:
    """Count the bytes of the weights of some models from their configs and saved stacks, without reading a weight.

    Args:
        device: kind of the device they compute on.

    Returns:
        The bytes, and a note on each model that cannot be looked at, which is not counted.
    """
    total, notes = 0, []
    for section in sections:
        try:
            total += _bytes(section, device)
        except UserError as error:
            notes.append(f"the memory of {section.path} is not counted: {str(error).removeprefix('model.path: ')}")
    return total, notes


def _bytes(section: ModelSection, device: str) -> int:
    base, saved, _ = resolve_section(section)
    head, labels = (saved.head, saved.labels) if saved else ("causal", None)
    model = skeleton(base, rows_head=head, labels=labels, device=device)
    layers = [*(saved.layers if saved else []), *imported(base, model)]
    storage = (base_storage.storages(layers) or [[]])[-1]
    for wrapper in storage:
        wrapper.attach(model)
    for index, layer in enumerate(layers):
        delta.mount_layer(model, layer, index)
    return weight_bytes(model, Stack(list(storage)))


def copied_bytes(model: nn.Module) -> int:
    """Count the bytes of a copy of everything that trains."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
