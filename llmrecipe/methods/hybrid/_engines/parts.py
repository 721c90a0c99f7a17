"""The wrappers a hybrid stands for, named so that a recipe may write them out."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from llmrecipe.core.registry import name_of
from llmrecipe.models.module_map import anatomy

if TYPE_CHECKING:
    from torch import nn

    from llmrecipe.methods._base.method import Wrapper

W = TypeVar("W", bound="Wrapper")


def part_of(hybrid: Wrapper, kind: type[W], stack: str = "", **options: object) -> W:
    """Build one part of a hybrid, called HYBRID_KIND, or HYBRID_STACK_KIND for one stack of blocks, and of the same role."""
    name = "_".join(filter(None, (hybrid.name, stack, name_of(kind))))
    return kind(name=name, role=hybrid.role, **options)


def attention_target(model: nn.Module) -> str:
    """Return the target of every attention module of a model, cross-attention included where it has one."""
    return "attn + cross" if anatomy(model).encoder_decoder else "attn"
