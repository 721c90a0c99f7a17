"""Heads on disk: among the tensors of a run, and in a file next to a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.foreign import reading
from llmrecipe.models.heads.cross_attention_head import CrossAttentionHead
from llmrecipe.models.heads.dense_head import DenseHead
from llmrecipe.models.heads.feature_head import FORMS, GEOMETRY, FeatureHead
from llmrecipe.models.heads.label_head import LabelHead
from llmrecipe.models.heads.pooled_head import PooledHead
from llmrecipe.models.heads.projection_head import ProjectionHead
from llmrecipe.models.heads.scalar_head import ScalarHead
from llmrecipe.models.heads.table_head import TableHead
from llmrecipe.models.pretrained import pretrained
from llmrecipe.models.task_heads import ATTRIBUTE, container, norm_behind, set_frozen

if TYPE_CHECKING:
    from llmrecipe.models.pretrained import LanguageModel

FILE = "heads.safetensors"
"""File next to a whole model's folder, which other programs load too and which therefore has no scalar head."""


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict into (the model's own tensors, those of its scalar heads)."""
    own = {k: v for k, v in state.items() if not k.startswith(f"{ATTRIBUTE}.")}
    return own, {k: v for k, v in state.items() if k not in own}


def write_heads(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Save heads next to a whole model; nothing is written where there are none."""
    if tensors:
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, str(folder / FILE))


def read_heads(model: LanguageModel, folder: Path) -> None:
    """Mount the heads saved next to a whole model, if there are any."""
    if (folder / FILE).is_file():
        with reading(str(folder / FILE), "copy the run again", ModelError):
            heads = load_file(str(folder / FILE))
        mount_heads(model, heads)


def mount_heads(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Mount frozen heads with the values of a saved run (names `task_head.<role>.weight` and so on); leave others alone."""
    heads = None
    for name, value in tensors.items():
        if not name.startswith(f"{ATTRIBUTE}."):
            continue
        heads = container(model) if heads is None else heads
        _, role, part = name.split(".", 2)
        if role not in heads:
            heads[role] = _empty_head(tensors, role, model).to(pretrained(model).get_input_embeddings().weight.device)
        head = heads[role]
        with torch.no_grad():
            head.state_dict(keep_vars=True)[part].copy_(value)
        set_frozen(head, True)


def _empty_head(tensors: Mapping[str, Tensor], role: str, model: nn.Module) -> nn.Module:
    """Return a head of the kind and the size that a role's saved tensors have; only a scalar head has a gain."""
    inside = f"{ATTRIBUTE}.{role}."
    own = {name.removeprefix(inside): value for name, value in tensors.items() if name.startswith(inside)}
    form = next((form for form in FORMS if f"{form}.weight" in own), None)
    if form is not None:
        hidden, width = own[f"{form}.weight"].shape
        return FeatureHead(form, int(width) + (GEOMETRY if form == "region" else 0), int(hidden))
    if "weight" in own:
        width = int(own["weight"].shape[1])
        return ScalarHead(width) if "gain" in own else DenseHead(width)
    if "projection" in own:
        outputs, width = own["projection"].shape
        return ProjectionHead(int(width), int(outputs))
    if "table" in own:
        return TableHead(own["table"])
    if "value.0.weight" in own:
        layers = sum(name.startswith("value.") and name.endswith(".weight") for name in own)
        return CrossAttentionHead(int(own["value.0.weight"].shape[1]), layers, norm_behind(model))
    if "dense.weight" not in own:
        outputs, width = own["out.weight"].shape
        return LabelHead(int(width), int(outputs))
    return PooledHead(int(own["dense.weight"].shape[1]), int(own["out.weight"].shape[0]))
