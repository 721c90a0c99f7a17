"""Which tokens are the first n and the last m of each document's prompt, worked out once a forward pass.

Of a prompt of P real tokens the first min(n, P // 2) and the last min(m, P // 2) are taken, so no token is both. Padding,
virtual tokens of other methods and generated tokens are never counted. A prompt is the one a batch marks off, a shared parent
of packed segments, or what generation reads into an empty cache; in an encoder it is the document. A pass that continues a
cache has none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import Layout, activate, current
from llmrecipe.data.transfer import to_device
from llmrecipe.methods._engines.document_tokens import stack_input
from llmrecipe.methods.additive._engines.virtual_tokens import Where
from llmrecipe.models.hooks.hook import Hook
from llmrecipe.models.kv_cache import cached, prompts_of

T = TypeVar("T")


@dataclass(frozen=True)
class EditedTokens:
    """Tokens of one side of their prompts."""

    index: Tensor
    """(M,) flat into R * T, ascending."""
    slot: Tensor
    """(M,) distance from that end of the prompt: 0 for its first token, or for its last."""

    def to(self, device: torch.device) -> EditedTokens:
        """Return the same places on a device."""
        return EditedTokens(to_device(self.index, device), to_device(self.slot, device))


@dataclass(frozen=True)
class PromptEnds:
    """The edited tokens of a pass."""

    first: EditedTokens
    last: EditedTokens


def ends_of(place: Tensor, prompt: Tensor, n: int, m: int) -> PromptEnds:
    """Return the first n and last m tokens of prompts, each at most half of its prompt.

    Args:
        place: (R, T) place of each token in its document; negative for tokens that do not count.
        prompt: (R, T) length of the prompt of each token's document.
    """
    half = prompt // 2
    back = prompt - 1 - place
    inside = (place >= 0) & (back >= 0)
    found = []
    for distance, most in ((place, n), (back, m)):
        index = (inside & (distance < half.clamp(max=most))).flatten().nonzero().squeeze(1)
        found.append(EditedTokens(index, distance.flatten()[index]))
    return PromptEnds(*found)


class PromptEndsOfPass(Hook):
    """At a stack of blocks: the ends of the prompts of every pass, for the hooks at its blocks."""

    def __init__(self, n: int, m: int, encoder: bool):
        super().__init__()
        self.n, self.m, self.encoder = n, m, encoder

    def wrap_module(self, call: Callable[..., T], inputs: dict[str, Any]) -> T:
        """Run the stack with the ends in its context; None where no token has a prompt."""
        context = current()
        if context.layout is not None:
            ends: PromptEnds | None = self._packed(context.layout, stack_input(inputs).device)
        else:
            ends = self._padded(inputs)
        with activate(dataclasses.replace(context, shared={**context.shared, self.owner: ends})):
            return call(**inputs)

    def _padded(self, inputs: dict[str, Any]) -> PromptEnds | None:
        tokens, context = stack_input(inputs), current()
        shape = tokens.shape[:2]
        if cached(inputs):
            return None
        given = inputs.get("attention_mask")
        mask = given if isinstance(given, Tensor) and given.dim() == 2 else context.attention_mask
        if mask is None or mask.shape != shape:
            mask = torch.ones(shape, dtype=torch.bool)
        lengths, virtual = context.prompt_lengths, _virtual(tokens)
        known = [context.on_host(one) for one in (mask, lengths) if one is not None]
        if all(one is not None for one in known) and (virtual is None or virtual.device.type == "cpu"):
            # How many tokens are edited depends on the values of both.
            mask, lengths = known[0], None if lengths is None else known[1]
        elif virtual is not None:
            virtual = virtual.to(tokens.device)
        assert mask is not None, "it is given or all ones"
        real = mask.bool() if virtual is None else mask.bool().to(virtual.device)
        prompt = real.sum(1) if self.encoder else prompts_of(inputs, lengths, real)
        if prompt is None:
            return None
        if virtual is not None:
            # They stand in the prompt, and both lengths and masks count them.
            prompt = prompt - virtual.expand(shape).sum(1)
            real = real & ~virtual
        place = (real.long().cumsum(1) - 1).masked_fill(~real, -1)
        ends = ends_of(place, prompt[:, None].to(place.device).expand(shape), self.n, self.m)
        return PromptEnds(ends.first.to(tokens.device), ends.last.to(tokens.device))

    def _packed(self, layout: Layout, device: torch.device) -> PromptEnds:
        key = ("prompt_ends", self.owner, self.n, self.m, self.encoder, device)
        if key not in layout.cache:
            place, prompt = (torch.full((layout.rows, layout.columns), fill, dtype=torch.long) for fill in (-1, 0))
            virtual = _virtual(place)
            parents = {s.parent for s in layout.segments if s.parent is not None}
            for i, segment in enumerate(layout.segments):
                if segment.parent is not None and segment.prompt and not self.encoder:
                    raise ModelError(
                        f"stack.{self.owner}: the ends of a prompt that is shared only in part by packed rows are not in one "
                        "place; set data.packing=off"
                    )
                length = segment.length if self.encoder or i in parents else segment.prompt
                here = (segment.row, slice(segment.start, segment.start + length))
                real = torch.ones(length, dtype=torch.bool)
                if virtual is not None:
                    real = ~virtual.expand(layout.rows, -1)[here].cpu()
                place[here] = (real.long().cumsum(0) - 1).masked_fill(~real, -1)
                prompt[here] = int(real.sum())
            ends = ends_of(place, prompt, self.n, self.m)
            layout.cache[key] = PromptEnds(ends.first.to(device), ends.last.to(device))
        return layout.cache[key]


def _virtual(tokens: Tensor) -> Tensor | None:
    """Return which columns (R, T) are virtual tokens of other methods, on the host where it knows them."""
    context = current()
    places = [w.virtual_token for w in context.shared.values() if isinstance(w, Where)]
    places = [place for place in places if place.shape[1] == tokens.shape[1]]
    known = [own for place in places if (own := context.on_host(place)) is not None]
    found = known if len(known) == len(places) else places
    return torch.stack([(place >= 0).expand(tokens.shape[0], -1) for place in found]).any(0) if found else None
