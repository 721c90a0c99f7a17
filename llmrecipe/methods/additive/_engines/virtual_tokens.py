"""Longer rows inside a model: P trained positions in each document that nobody outside ever sees.

Letters: R rows, T columns, n documents of a packed row, P virtual tokens of a document, D width.

A hook at the backbone opens P columns in every document (at its front, or after its first token), runs the backbone over
the longer rows and takes the columns out of the states again; a hook at the embedding puts the trained rows there. Masks,
positions, token types, tasks, the layout of packed rows and the context follow. Batches, objectives and generation keep
their own indices; a key/value cache holds the virtual tokens once, from the first pass on, and later passes only widen masks
and move positions on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import Context, Layout, activate, current
from llmrecipe.data.transfer import to_device
from llmrecipe.methods._engines.document_tokens import host_of, stack_input
from llmrecipe.methods.additive._engines.prefix_kv import positions, takes_positions
from llmrecipe.models.hooks.hook import EDIT, ROWS, Hook, all_hooks
from llmrecipe.models.hooks.host import add_hook
from llmrecipe.models.kv_cache import cached
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.pretrained import pretrained
from llmrecipe.models.vocabulary import position_offset

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutput

T = TypeVar("T")


@dataclass(frozen=True)
class Opening:
    """Where columns open in the rows of one pass."""

    new: Tensor
    """(R, T) the column each old column moves to."""
    order: Tensor
    """(R, T + nP) what stands in each new column: an old column, or T + j for virtual token j."""
    near: Tensor
    """(R, T + nP) the same with the old column after it in place of a virtual token."""
    moved: Tensor
    """(R, T) whether a column stands after its document's virtual tokens."""

    def fill(self, x: Tensor, virtual_tokens: Tensor) -> Tensor:
        """Put old columns (R, T, ...) and virtual tokens (R | 1, P, ...) into their new places."""
        both = torch.cat((x, virtual_tokens.expand(x.shape[0], *virtual_tokens.shape[1:]).to(x.dtype)), 1)
        return _take(both, self.order)

    def close(self, x: Tensor) -> Tensor:
        """Remove the virtual tokens, (R, T + nP, ...) -> (R, T, ...)."""
        return _take(x, self.new)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Take columns of each row, of any trailing shape."""
    index = index.expand(x.shape[0], -1)
    return x.gather(1, index.view(*index.shape, *(1,) * (x.dim() - 2)).expand(*index.shape, *x.shape[2:]))


def opening(starts: Tensor, columns: int, virtual_tokens: int, behind: int) -> Opening:
    """Open `virtual_tokens` columns in every document.

    Args:
        starts: (R, n) first column of each document, ascending.
        columns: T.
        behind: how many tokens of a document stay before its virtual tokens.
    """
    at = starts + behind
    rows, documents = at.shape
    old = torch.arange(columns, device=at.device)
    before = (at[:, :, None] <= old).sum(1)
    new = old + virtual_tokens * before
    places = (at + virtual_tokens * torch.arange(documents, device=at.device))[:, :, None] + torch.arange(
        virtual_tokens, device=at.device
    )
    places = places.flatten(1)
    order = torch.empty(rows, columns + virtual_tokens * documents, dtype=torch.long, device=at.device)
    order.scatter_(1, new, old.expand(rows, -1))
    near = order.scatter(1, places, at.clamp(max=columns - 1).repeat_interleave(virtual_tokens, 1))
    order = order.scatter(
        1, places, columns + torch.arange(virtual_tokens, device=at.device).repeat(documents).expand(rows, -1)
    )
    kept = ((old >= starts[:, :, None]) & (old < at[:, :, None])).any(1)
    return Opening(new, order, near, ~kept)


def masked_opening(
    mask: Tensor | None, rows: int, columns: int, virtual_tokens: int, behind: int, device: torch.device
) -> Opening:
    """Return the opening of padded rows: one document a row, starting at the first column the mask (R, T) shows."""
    if mask is None:
        starts = torch.zeros(rows, 1, dtype=torch.long, device=device)
    elif mask.dim() != 2:
        raise ModelError("prompt tuning widens masks of shape (rows, columns); a static cache brings others: use a dynamic one")
    else:
        starts = (mask != 0).int().argmax(1, keepdim=True)
    return opening(starts, columns, virtual_tokens, behind)


def longer_layout(layout: Layout, virtual_tokens: int) -> Layout:
    """Return the layout of a packed row with virtual tokens in its documents; continuations of a parent get none."""
    segments = []
    column = 0
    for segment in layout.segments:
        own = virtual_tokens if segment.parent is None else 0
        segments.append(dataclasses.replace(segment, start=column, length=segment.length + own, prompt=segment.prompt + own))
        column += segment.length + own
    return Layout(tuple(segments), layout.rows, column)


@dataclass(frozen=True)
class Where:
    """Which virtual token stands in each column of a first pass."""

    virtual_token: Tensor
    """(R, T + nP); -1 where none does."""


class VirtualTokenRows(Hook):
    """At the embedding: the trained rows E (P, D) in place of whatever stands in the virtual tokens."""

    order = EDIT

    def __init__(self, embeddings: Tensor):
        super().__init__()
        self.embeddings = nn.Parameter(embeddings)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return embeddings (R, T, D) with E at the virtual tokens of a first pass."""
        which = current().shared.get(self.owner)
        if which is None:
            return y
        own = nn.functional.embedding(which.virtual_token.clamp(min=0), self.embeddings).to(y.dtype)
        return torch.where((which.virtual_token >= 0).unsqueeze(-1), own, y)


class VirtualTokens(Hook):
    """At the backbone: rows that are longer by P columns a document on the way in, and not on the way out."""

    order = ROWS

    def __init__(self, virtual_tokens: int, behind: int, offset: int, reads_positions: bool, keep: bool):
        super().__init__()
        self.rows: tuple[VirtualTokenRows, ...] = ()
        """The hook at the embedding, which is not called where a pass reads embeddings; a tuple, so that it is no child."""
        self.virtual_tokens, self.behind, self.offset = virtual_tokens, behind, offset
        self.reads_positions = reads_positions
        """Whether the backbone takes position ids."""
        self.keep = keep
        """Whether the virtual tokens' states stay, for a decoder to read."""

    def wrap_module(self, call: Callable[..., T], inputs: dict[str, Any]) -> T:
        """Run the backbone over rows with virtual tokens."""
        if cached(inputs):
            return call(**self.later(inputs))
        read = stack_input(inputs)
        ids = read if read.dim() == 2 else read[..., 0]
        opened = self.open(inputs.get("attention_mask"), ids)
        same = inputs.get("attention_mask") is current().attention_mask
        with activate(self.context(opened, ids, same)) as longer:
            out = call(**self.first(inputs, opened, read, longer.attention_mask if same else None))
        return out if self.keep else _closed(out, opened)

    def open(self, mask: Tensor | None, ids: Tensor) -> Opening:
        """Return the opening of a first pass."""
        layout = current().layout
        if layout is None:
            return masked_opening(mask, ids.shape[0], ids.shape[1], self.virtual_tokens, self.behind, ids.device)
        key = ("virtual_tokens", self.virtual_tokens, self.behind)
        if key not in layout.cache:
            starts = to_device(torch.tensor([[s.start for s in layout.segments if s.parent is None]]), ids.device)
            layout.cache[key] = opening(starts, ids.shape[1], self.virtual_tokens, self.behind)
        return layout.cache[key]

    def first(self, inputs: dict[str, Any], opened: Opening, read: Tensor, known: Tensor | None) -> dict[str, Any]:
        """Return the inputs of a first pass; ids at the virtual tokens are a neighbour's and are never embedded.

        Args:
            read: ids (R, T), or embeddings (R, T, D), which get the trained rows here.
            known: mask of the longer rows (R, T + P) where the context has it already.
        """
        longer = _take(read, opened.near)
        changed = {**inputs, "input_ids": longer}
        if read.dim() > 2:
            (rows,) = self.rows
            changed |= {"input_ids": None, "inputs_embeds": rows.after(longer, longer)}
        mask = inputs.get("attention_mask")
        if mask is not None:
            changed["attention_mask"] = self.lengthened(mask, opened) if known is None else known
        if inputs.get("token_type_ids") is not None:
            changed["token_type_ids"] = _take(inputs["token_type_ids"], opened.near)
        if self.reads_positions:
            changed["position_ids"] = self.places(positions(inputs, self.offset), opened, self.offset)
        return changed

    def places(self, given: Tensor, opened: Opening, first: int) -> Tensor:
        """Return positions of longer rows: virtual tokens count on from the tokens before them, the rest goes on after them."""
        virtual_tokens = torch.arange(self.virtual_tokens, device=given.device)[None] + first + self.behind
        return opened.fill(given.expand(opened.moved.shape[0], -1) + self.virtual_tokens * opened.moved, virtual_tokens)

    def later(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of a pass over a cache that holds the virtual tokens."""
        changed = dict(inputs)
        mask = inputs.get("attention_mask")
        if mask is not None:
            opened = masked_opening(mask, mask.shape[0], mask.shape[1], self.virtual_tokens, self.behind, mask.device)
            changed["attention_mask"] = opened.fill(mask, mask.new_ones(1, self.virtual_tokens))
        if inputs.get("position_ids") is not None or (self.reads_positions and mask is not None):
            changed["position_ids"] = positions(inputs, self.offset) + self.virtual_tokens
        return changed

    def lengthened(self, mask: Tensor, opened: Opening) -> Tensor:
        """Return the mask of longer rows."""
        return opened.fill(mask, mask.new_ones(1, self.virtual_tokens))

    def context(self, opened: Opening, ids: Tensor, same: bool) -> Context:
        """Return the context of longer rows, with what the host knows of them.

        Args:
            same: whether the rows were opened by the mask of the context that is running.
        """
        context, columns = current(), ids.shape[1]
        which = (opened.order - columns).clamp(min=-1).expand(ids.shape[0], -1)
        # Virtual tokens of prompts further out keep their places among the new columns.
        none = which.new_full((1, self.virtual_tokens), -1)
        shared = {k: Where(opened.fill(v.virtual_token, none)) for k, v in context.shared.items() if isinstance(v, Where)}
        layout, mask, places = context.layout, context.attention_mask, context.positions
        tasks, read = context.task_ids, context.read
        longer = None if mask is None else self.lengthened(mask, opened)
        lengths = None if context.prompt_lengths is None else context.prompt_lengths + self.virtual_tokens
        here = list(context.here)
        if same and ids.device.type != "cpu" and (own := self._on_host(context, *ids.shape)) is not None:
            here.append((which, (own.order - columns).clamp(min=-1).expand(ids.shape[0], -1)))
            for name, other in shared.items():
                if (known := context.on_host(context.shared[name].virtual_token)) is not None:
                    here.append((other.virtual_token, own.fill(known, known.new_full((1, self.virtual_tokens), -1))))
            if mask is not None and longer is not None and (known := context.on_host(mask)) is not None:
                here.append((longer, self.lengthened(known, own)))
            if lengths is not None and (known := context.on_host(cast("Tensor", context.prompt_lengths))) is not None:
                here.append((lengths, known + self.virtual_tokens))
        return dataclasses.replace(
            context,
            layout=None if layout is None else longer_layout(layout, self.virtual_tokens),
            attention_mask=longer,
            positions=None if places is None else self.places(places, opened, 0),
            task_ids=tasks if tasks is None or tasks.shape[1] != columns else _take(tasks, opened.near),
            prompt_lengths=lengths,
            here=tuple(here),
            read=None if read is None else self._read(read, opened, columns),
            shared={**context.shared, **shared, self.owner: Where(which)},
        )

    def _on_host(self, context: Context, rows: int, columns: int) -> Opening | None:
        """Return the opening of a pass on another device where the host knows the mask or the layout that it depends on."""
        host, mask = torch.device("cpu"), context.attention_mask
        if context.layout is not None:
            starts = torch.tensor([[s.start for s in context.layout.segments if s.parent is None]])
            return opening(starts, columns, self.virtual_tokens, self.behind)
        known = None if mask is None else context.on_host(mask)
        if mask is not None and known is None:
            return None
        return masked_opening(known, rows, columns, self.virtual_tokens, self.behind, host)

    def _read(self, read: Tensor, opened: Opening, columns: int) -> Tensor:
        rows = read // columns
        return rows * opened.order.shape[1] + opened.new[rows, read % columns]


class VirtualTokenMask(Hook):
    """At the decoder of a pair: the encoder's virtual tokens are open to cross-attention."""

    def __init__(self, virtual_tokens: int, behind: int):
        super().__init__()
        self.virtual_tokens, self.behind = virtual_tokens, behind

    def wrap_module(self, call: Callable[..., T], inputs: dict[str, Any]) -> T:
        """Run the decoder with a mask as wide as the encoder's states."""
        mask, states = inputs.get("encoder_attention_mask"), inputs.get("encoder_hidden_states")
        if mask is None or states is None or states.shape[1] < mask.shape[-1] + self.virtual_tokens:
            return call(**inputs)
        opened = masked_opening(mask, mask.shape[0], mask.shape[-1], self.virtual_tokens, self.behind, mask.device)
        return call(**{**inputs, "encoder_attention_mask": opened.fill(mask, mask.new_ones(1, self.virtual_tokens))})


def _closed(out: T, opened: Opening) -> T:
    """Return a backbone's output without the virtual tokens."""
    if isinstance(out, tuple):
        return cast(T, (opened.close(out[0]), *out[1:]))
    whole = cast("BaseModelOutput", out)
    assert whole.last_hidden_state is not None
    whole.last_hidden_state = opened.close(whole.last_hidden_state)
    states = getattr(out, "hidden_states", None)
    if states is not None:
        whole.hidden_states = tuple(opened.close(h) for h in states)
    return out


def attach_virtual_tokens(model: nn.Module, name: str, virtual_tokens: int, behind: int) -> VirtualTokenRows:
    """Add the virtual tokens at the backbone (the encoder of a pair) and their rows, still zero, at its embedding."""
    parts = anatomy(model)
    pair = parts.encoder_decoder
    host = host_of(model, "encoder" if pair else next(s.side for s in parts.sites if s.role == "block"))
    embedding = pretrained(host).get_input_embeddings()
    if pair:
        add_hook(host_of(model, "decoder"), name, VirtualTokenMask(virtual_tokens, behind), name)
    rows = VirtualTokenRows(torch.zeros(virtual_tokens, embedding.weight.shape[1], device=embedding.weight.device))
    add_hook(embedding, name, rows, name)
    tokens = VirtualTokens(virtual_tokens, behind, position_offset(host), takes_positions(host), pair)
    tokens.rows = (rows,)
    add_hook(host, name, tokens, name)
    return rows


def virtual_rows(model: nn.Module, name: str) -> tuple[nn.Module, VirtualTokenRows]:
    """Return the embedding that holds a wrapper's rows, and the rows."""
    return next((module, hook) for _, module, _, hook in all_hooks(model, name) if isinstance(hook, VirtualTokenRows))


@torch.no_grad()
def init_virtual_tokens(model: nn.Module, name: str, init: str) -> None:
    """Initialize the rows: `vocab` (random tokens), `uniform`, `normal`; `text` waits for a tokenizer."""
    embedding, rows = virtual_rows(model, name)
    if init == "uniform":
        rows.embeddings.uniform_(-0.5, 0.5)
    elif init == "normal":
        rows.embeddings.normal_()
    elif init == "vocab":
        weight: Any = embedding.weight
        count = int(weight.shape[0])
        copy_tokens(model, name, torch.randint(count, (rows.embeddings.shape[0],)).tolist())


@torch.no_grad()
def copy_tokens(model: nn.Module, name: str, ids: list[int]) -> None:
    """Copy the embeddings of these tokens, the embedding's own scale included."""
    embedding, rows = virtual_rows(model, name)
    rows.embeddings.copy_(embedding(torch.tensor(ids, device=rows.embeddings.device)[None])[0])
