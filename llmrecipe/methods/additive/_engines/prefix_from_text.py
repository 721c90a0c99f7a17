"""Prefix tables that start as the keys and values a frozen model computes for a text.

Letters: R rows, H query heads, T tokens, Ev value head size, P virtual tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.forward_context import activate, current
from llmrecipe.data.tokenize.call_tokenizer import call_tokenizer
from llmrecipe.methods._engines.document_tokens import host_of
from llmrecipe.methods.additive._engines.prefix_kv import ColumnPlan, attention_sites, tables_of, takes_positions
from llmrecipe.models.hooks.hook import Hook
from llmrecipe.models.hooks.host import add_hook, remove_hook
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.pretrained import backbone_of
from llmrecipe.models.vocabulary import position_offset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Recorder(Hook):
    """Keeps the keys and values an attention module is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[Tensor, Tensor] | None = None

    def attention(self, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute attention (R, H, T, Ev) without columns."""
        self.seen = (k.detach(), v.detach())
        return attend(q, k, v)


@torch.no_grad()
def start_from_text(model: nn.Module, name: str, plan: ColumnPlan, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Fill flat tables with the keys and values the frozen model computes for a text, repeated or cut to P tokens.

    With rotary positions the text stands at -P .. -1 (`free`) or 0 .. P-1 (`shift`), so that the prefix is exactly that text
    before every document. Learned positions begin at 0: the text stands there, and only `shift` is exact.

    Raises:
        RecipeError: no text, or a model with an encoder and a decoder.
    """
    parts = anatomy(model)
    if parts.encoder_decoder:
        raise RecipeError(
            f"stack.{name}.init: text reads one stack of blocks; encoder-decoder models start with random or zero"
        )
    ids = text_ids(tokenizer, text, plan.virtual_tokens, name)
    start = -plan.virtual_tokens if parts.rope and not plan.shift else 0
    device = next(model.parameters()).device
    sites = [s for roles in attention_sites(model, plan.target, name).values() for group in roles.values() for s in group]
    label = f"{name}_recorder"
    recorders = [add_hook(s.module, label, Recorder(), label) for s in sites]
    was = model.training
    model.eval()
    try:
        with activate(dataclasses.replace(current(), off=current().off | {name}, layout=None)):
            place = torch.arange(start, start + plan.virtual_tokens, device=device)[None]
            host = host_of(model, sites[0].side)
            inputs = {"position_ids": place + position_offset(host)} if takes_positions(host) else {}
            backbone_of(model)(input_ids=torch.tensor([ids], device=device), **inputs)
        (hook,) = tables_of(model, name)
        (table,) = hook.tables.values()
        seen = [r.seen for r in recorders if isinstance(r, Recorder) and r.seen is not None]
        table.flat.copy_(table.join([(k.float(), v.float()) for k, v in seen]))  # type: ignore[operator]
    finally:
        for site in sites:
            remove_hook(site.module, label)
        model.train(was)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, count: int, name: str) -> list[int]:
    """Return token ids of a text, repeated or cut to `count`.

    Raises:
        RecipeError: the text is empty.
    """
    ids = list(call_tokenizer(tokenizer, text, add_special_tokens=False)["input_ids"]) if text else []
    if not ids:
        raise RecipeError(f"stack.{name}.init_text: init: text needs a text with at least one token")
    return (ids * (count // len(ids) + 1))[:count]
