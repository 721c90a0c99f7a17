"""Training only the rows of tokens that were added: the rest of the vocabulary stays bit-equal.

    embedding   y = W[t] + s D[t - first]             for added tokens t >= first, s the family's embedding scale
    head        z_t = x W[t]^T + x D[t - first]^T

D (n, width) is initialized to zero, so the model starts unchanged. It is one parameter where the head is tied to the embedding,
two otherwise. A gradient mask on W would not do: weight decay and momentum move masked rows, and optimizer state
would have the size of the vocabulary. Folding adds D to W.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmrecipe.models.hooks.hook import Hook
from llmrecipe.models.hooks.host import add_hook, remove_hook
from llmrecipe.models.vocabulary import input_embedding

if TYPE_CHECKING:
    from llmrecipe.models.pretrained import LanguageModel


NAME = "new_rows"
"""Child name of the hooks, on the embedding and on the head."""


class EmbeddingRows(Hook):
    """The part of added tokens in the embedding."""

    def __init__(self, difference: nn.Parameter, first: int, scale: float):
        super().__init__()
        self.difference, self.first, self.scale = difference, first, scale

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the learned difference to the embeddings (..., D) of added tokens among the ids (...)."""
        own = (x >= self.first).unsqueeze(-1)
        moved = nn.functional.embedding((x - self.first).clamp(min=0), self.difference) * self.scale
        return y + torch.where(own, moved, torch.zeros_like(moved)).to(y.dtype)

    @torch.no_grad()
    def merge(self, module: nn.Module) -> None:
        """Fold the difference: W[first:] += D."""
        rows: Tensor = module.weight[self.first :]  # type: ignore[index]
        rows += self.difference.to(rows.dtype)


class HeadRows(Hook):
    """The part of added tokens in the head."""

    def __init__(self, difference: nn.Parameter, first: int, tied: bool):
        super().__init__()
        self.difference, self.first, self.tied = difference, first, tied

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the learned difference to the logits (..., V) of added tokens, from the states (..., D)."""
        extra = nn.functional.linear(x, self.difference.to(x.dtype)).to(y.dtype)
        return torch.cat((y[..., : self.first], y[..., self.first :] + extra), -1)

    @torch.no_grad()
    def merge(self, module: nn.Module) -> None:
        """Fold the difference: W[first:] += D, unless the embedding's hook does it for the tied matrix."""
        if not self.tied:
            rows: Tensor = module.weight[self.first :]  # type: ignore[index]
            rows += self.difference.to(rows.dtype)


def add_token_rows(model: LanguageModel, count: int) -> None:
    """Add separate trainable rows for the last `count` tokens; they are listed in `model.new_heads`."""
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    first = embed.weight.shape[0] - count
    tied = head is not None and head.weight is embed.weight

    def fresh(weight: Tensor) -> nn.Parameter:
        return nn.Parameter(torch.zeros(count, weight.shape[1], device=weight.device))

    difference = fresh(embed.weight)
    scale = getattr(embed, "embed_scale", 1.0)
    factor = 1.0 if isinstance(scale, Tensor) and scale.is_meta else float(scale)
    add_hook(embed, NAME, EmbeddingRows(difference, first, factor), NAME)
    if head is not None:
        add_hook(head, NAME, HeadRows(difference if tied else fresh(head.weight), first, tied), NAME)
    paths = {id(module): path for path, module in model.named_modules()}
    homes = [f"{paths[id(module)]}.{NAME}" for module in (embed, head) if module is not None]
    model.new_heads = (*getattr(model, "new_heads", ()), *homes)


def fold_token_rows(model: LanguageModel) -> int:
    """Add the learned differences to the weights and remove the hooks; return the number of hooks.

    Runs that train every weight, merged exports and runs built on a finished one do this first.
    """
    ends = (input_embedding(model), model.get_output_embeddings())
    found = [module for module in ends if module is not None and hasattr(module, NAME)]
    for module in found:
        getattr(module, NAME).merge(module)
    for module in found:
        remove_hook(module, NAME)
    if found:
        model.new_heads = tuple(path for path in model.new_heads if not path.endswith(f".{NAME}"))
    return len(found)
