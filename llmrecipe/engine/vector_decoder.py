"""An encoder as the decoder of one vector: causal attention, and cross-attention whose only key is that vector.

Attention over a single key is its value whatever the query is, so cross-attention adds one vector a sequence at each layer, and
neither queries nor keys of it exist.

Letters: R rows, T columns, D hidden width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from llmrecipe.core.forward_context import Context, current
from llmrecipe.data.collate import Batch
from llmrecipe.models.hooks.hook import EDIT, Hook
from llmrecipe.models.hooks.host import add_hook, remove_hook
from llmrecipe.models.module_map import anatomy

OWNER = "pooled_decoder"
"""Name of the hooks, and of what they read in `Context.shared`."""


class CrossAttended(Hook):
    """Adds a layer's cross-attention, where the running pass decodes a vector. It has no parameters of its own."""

    order = EDIT

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer

    def active(self) -> bool:
        """Return whether the running pass decodes."""
        return OWNER in current().shared

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return what stands in the residual stream behind self-attention (before a norm: its sublayer), changed."""
        step: Callable[[Tensor], Tensor] = current().shared[OWNER][self.layer]
        return step(y)


def decoder_sites(model: nn.Module) -> list[nn.Module]:
    """Return the module of each layer whose output cross-attention is added to.

    With norms before a sublayer that is the output projection of attention, otherwise the norm behind attention.
    """
    found = anatomy(model)
    return [site.module for site in found.at("attn.o" if found.pre_norm else "norm.attn")]


def mount_decoder(model: nn.Module) -> None:
    """Add the hooks to a model that has none of them."""
    for layer, module in enumerate(decoder_sites(model)):
        if not hasattr(module, OWNER):
            add_hook(module, OWNER, CrossAttended(layer), OWNER)


def unmount_decoder(model: nn.Module) -> None:
    """Remove the hooks of a model that has them."""
    for module in decoder_sites(model):
        if hasattr(module, OWNER):
            remove_hook(module, OWNER)


def encoder_rows(batch: Batch) -> Batch:
    """Return the padded rows that the encoder reads (`extra`: encoder_ids, encoder_mask) as a batch without targets."""
    mask = batch.extra["encoder_mask"]
    rows, columns = mask.shape
    positions = torch.arange(columns, device=mask.device) * mask
    last = torch.arange(rows, device=mask.device) * columns + mask.sum(-1) - 1
    none = batch.target[:0]
    return dataclasses.replace(
        batch, input_ids=batch.extra["encoder_ids"], attention_mask=mask, position_ids=positions, layout=None, source=none,
        target=none, sequence=none, last=last, task_ids=None, prompt_lengths=None, extra={},
    )  # fmt: skip


def decoding(steps: Sequence[Callable[[Tensor], Tensor]]) -> Context:
    """Return the running context, for a pass whose layers take the steps."""
    return dataclasses.replace(current(), read=None, shared={**current().shared, OWNER: steps})
