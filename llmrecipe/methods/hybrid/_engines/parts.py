"""The wrappers a hybrid stands for, named so that a recipe may write them out."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from llmrecipe.core.registry import name_of
from llmrecipe.models.module_map import anatomy

if TYPE_CHECKING:
    from torch import nn

    from llmrecipe.methods._base.method import Wrapper

W = TypeVar("W", bound="Wrapper")


def part_of(hybrid: Wrapper, kind: type[W], **options: object) -> W:
    """Build one part of a hybrid, called HYBRID_KIND and of the same role."""
    return kind(name=f"{hybrid.name}_{name_of(kind)}", role=hybrid.role, **options)


def attention_target(model: nn.Module) -> str:
    """Return the target of every attention module of a model, cross-attention included where it has one."""
    return "attn + cross" if anatomy(model).encoder_decoder else "attn"
