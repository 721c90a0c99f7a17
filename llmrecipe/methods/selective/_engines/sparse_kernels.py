"""Gradients of a selection, formed at the selected numbers only (see `sparse_delta`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipe.methods.selective._engines.blocks import (
    block_size,
    gather_blocks,
    put_blocks,
)

Layout = str
"""`entries`, `rows`, `columns`, or `blocks l` for square blocks of l x l numbers (see `blocks`)."""

CHUNK = 1 << 21
"""Numbers in one chunk of gathered products."""


def selected_shape(shape: tuple[int, ...], layout: Layout, count: int) -> tuple[int, ...]:
    """Return the shape of the trained values of a selection."""
    if size := block_size(layout):
        return count, size, size
    return {"entries": (count,), "rows": (count, *shape[1:]), "columns": (*shape[:-1], count)}[layout]


def product_gradient(
    a: Tensor, b: Tensor, idx: Tensor, layout: Layout, shape: tuple[int, ...], dtype: torch.dtype, cut: bool = False
) -> Tensor:
    """Return a^T b at the selection, for a (M, d0) and b (M, d1) of a tensor (d0, d1); `cut`: the input is already selected."""
    if layout != "entries":
        if layout == "rows":
            a = a if cut else a.index_select(1, idx)
        else:
            b = b if cut else b.index_select(1, idx)
        kind = torch.promote_types(a.dtype, b.dtype)
        return (a.to(kind).t() @ b.to(kind)).to(dtype)
    # Transposed copies make each gather a read of whole rows; formed entry by entry in chunks, no n x n intermediate exists.
    at, bt = a.t().contiguous(), b.t().contiguous()
    size = max(1, CHUNK // max(1, a.shape[0]))
    found = torch.empty(idx.shape[0], dtype=dtype, device=a.device)
    for first in range(0, idx.shape[0], size):
        part = idx[first : first + size].long()
        left, right = at[part // shape[1]].to(dtype), bt[part % shape[1]].to(dtype)
        found[first : first + size] = left.mul_(right).sum(1)
    return found


def embedding_gradient(
    ids: Tensor, g: Tensor, idx: Tensor, layout: Layout, shape: tuple[int, ...], dtype: torch.dtype, padding: int | None
) -> Tensor:
    """Return the gradient of the selected entries of an embedding (V, D), from the tokens that occur only.

    No shape depends on which tokens occur, so a device is not waited for: M tokens are at most M different ones.
    """
    # A row that no token has takes what is not to be counted.
    none = shape[0]
    if padding is not None:
        ids = ids.masked_fill(ids == padding, none)
    if layout == "columns":
        found = torch.zeros(none + 1, idx.shape[0], dtype=dtype, device=g.device)
        return found.index_add_(0, ids, g.index_select(1, idx).to(dtype))[:none]
    if not ids.numel():
        return torch.zeros(selected_shape(shape, layout, idx.shape[0]), dtype=dtype, device=g.device)
    ordered, order = ids.sort(stable=True)
    place = F.pad((ordered[1:] != ordered[:-1]).long().cumsum(0), (1, 0))
    where = torch.empty_like(order).scatter_(0, order, place)
    tokens = torch.full_like(ids, none).scatter_(0, place, ordered)
    summed = torch.zeros(ids.shape[0], shape[1], dtype=dtype, device=g.device).index_add_(0, where, g.to(dtype))
    rows = idx.long() if layout == "rows" else idx.long() // shape[1]
    near = torch.searchsorted(tokens, rows).clamp_(max=ids.shape[0] - 1)
    hit = tokens[near] == rows
    if layout == "rows":
        return torch.where(hit[:, None], summed[near], 0.0)
    return torch.where(hit, summed[near, idx.long() % shape[1]], 0.0)


def gather_selected(weight: Tensor, layout: Layout, idx: Tensor) -> Tensor:
    """Return a copy of the selected numbers of a tensor."""
    if layout == "entries":
        return weight.reshape(-1).index_select(0, idx)
    if size := block_size(layout):
        return gather_blocks(weight, idx, size)
    return weight.index_select(0 if layout == "rows" else weight.dim() - 1, idx)


def put(weight: Tensor, layout: Layout, idx: Tensor, new: Tensor) -> None:
    """Overwrite the selected numbers of a tensor."""
    if layout == "entries":
        weight.view(-1).index_copy_(0, idx.long(), new)
    elif size := block_size(layout):
        put_blocks(weight, idx, size, new)
    else:
        weight.index_copy_(0 if layout == "rows" else weight.dim() - 1, idx.long(), new)
