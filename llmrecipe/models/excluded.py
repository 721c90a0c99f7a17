"""Weights of a base that an objective excludes from training because its losses do not use them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llmrecipe.models.masked_heads import head_chain

if TYPE_CHECKING:
    from llmrecipe.models.pretrained import LanguageModel


def freeze_below_head(model: LanguageModel) -> None:
    """Exclude everything but the head of a classifier from training, where no wrapper of a stack says what trains."""
    for name, parameter in model.named_parameters():
        if name.startswith(f"{model.base_model_prefix}."):
            parameter.frozen_base = True  # type: ignore[attr-defined]


def without_language_head(model: LanguageModel) -> None:
    """Exclude a language-model head from training, save what it shares with the embedding: hidden states get by without it."""
    head, embed = head_chain(model) or model.get_output_embeddings(), model.get_input_embeddings()
    tied = {id(p) for p in embed.parameters()} if embed is not None else set()
    for module in head.modules() if head is not None else ():
        module.frozen_base = True  # type: ignore[assignment]
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in tied:
                parameter.frozen_base = True  # type: ignore[attr-defined]


def excluded(part: nn.Module | Tensor | None) -> bool:
    """Return whether the objective excluded a weight of the base from training, or a module that its losses do not call."""
    return getattr(part, "frozen_base", False)


def is_excluded(model: nn.Module, name: str) -> bool:
    """Return whether a tensor or module, or a module that it is in, is excluded from training."""
    part: Any = model
    for step in name.split("."):
        part = getattr(part, step, None)
        if excluded(part):
            return True
    return False
