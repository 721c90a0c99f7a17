"""Square blocks of a matrix as a selection: where they are, reading, writing, and their gradient alone.

A matrix (d0, d1) is a grid of ceil(d0 / l) x ceil(d1 / l) blocks, numbered row by row. Values are (n, l, l); the part of an
edge block that hangs over the matrix is never written and has no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipe.data.transfer import to_device


def block_size(layout: str) -> int:
    """Return l of the layout `blocks l`, 0 of any other."""
    return int(layout.partition(" ")[2] or 0)


def grid(shape: tuple[int, ...], size: int) -> tuple[int, int]:
    """Return how many blocks a matrix has down and across."""
    return -(-shape[0] // size), -(-shape[1] // size)


def _places(shape: tuple[int, ...], idx: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows (n, l, 1), columns (n, 1, l), and which numbers (n, l, l) are inside the matrix."""
    across, step = grid(shape, size)[1], torch.arange(size, device=idx.device)
    idx = idx.long()
    rows = (idx // across * size)[:, None, None] + step[:, None]
    columns = (idx % across * size)[:, None, None] + step
    return rows, columns, (rows < shape[0]) & (columns < shape[1])


def gather_blocks(weight: Tensor, idx: Tensor, size: int) -> Tensor:
    """Return a copy of the chosen blocks (n, l, l), zero outside the matrix."""
    rows, columns, inside = _places(tuple(weight.shape), idx, size)
    found = weight[rows.clamp(max=weight.shape[0] - 1), columns.clamp(max=weight.shape[1] - 1)]
    return found.masked_fill(~inside, 0.0)


def put_blocks(weight: Tensor, idx: Tensor, size: int, new: Tensor) -> None:
    """Overwrite the chosen blocks."""
    rows, columns, inside = _places(tuple(weight.shape), idx, size)
    # What hangs over writes the first number of its block once more: how much does so is not known without reading it.
    rows, columns = torch.where(inside, rows, rows[:, :1]), torch.where(inside, columns, columns[:, :, :1])
    weight[rows, columns] = torch.where(inside, new, new[:, :1, :1])


@dataclass(frozen=True)
class BlockPlan:
    """How the gradient of chosen blocks is formed: their indices, sorted on the host."""

    idx: Tensor
    """(n,)"""
    shape: tuple[int, ...]
    size: int
    rows: bool
    """Whether inputs run along the rows of the stored matrix, as in Conv1D, and not along its columns."""
    features: Tensor
    """(u l,) the input features that the blocks read, each once."""
    outputs: tuple[tuple[int, Tensor, Tensor], ...]
    """For each block row of the outputs its number, which blocks are in it, and their places among the features' blocks."""


def block_plan(idx: Tensor, shape: tuple[int, ...], size: int, rows: bool) -> BlockPlan:
    """Return the plan of a selection; this reads the indices, so a selection has it made once."""
    across, device = grid(shape, size)[1], idx.device
    here = idx.long().cpu()
    inputs, outputs = (here // across, here % across) if rows else (here % across, here // across)
    touched = torch.unique(inputs)
    place = torch.searchsorted(touched, inputs)
    features = (touched[:, None] * size + torch.arange(size)).flatten()
    parts = [(number, (outputs == number).nonzero().squeeze(1)) for number in torch.unique(outputs).tolist()]
    moved = tuple((number, to_device(own, device), to_device(place[own], device)) for number, own in parts)
    return BlockPlan(idx, shape, size, rows, to_device(features, device), moved)


def kept_features(x: Tensor, plan: BlockPlan) -> Tensor:
    """Return a copy (M, u l) of the input features that the chosen blocks read, each once."""
    down, across = grid(plan.shape, plan.size)
    padded = F.pad(x, (0, (down if plan.rows else across) * plan.size - x.shape[-1]))
    return padded.reshape(-1, padded.shape[-1]).index_select(1, plan.features)


def block_gradient(x: Tensor, g: Tensor, plan: BlockPlan, dtype: torch.dtype) -> Tensor:
    """Return the gradient (n, l, l) of the chosen blocks, one product for each block row of the outputs.

    Args:
        x: (M, u l) what `kept_features` kept.
        g: (M, out) gradient of the layer's output.
    """
    (down, across), size = grid(plan.shape, plan.size), plan.size
    g = F.pad(g, (0, (across if plan.rows else down) * size - g.shape[-1]))
    kind = torch.promote_types(x.dtype, g.dtype)
    left, right = g.to(kind).t(), x.to(kind).view(x.shape[0], -1, size)
    found = torch.empty(plan.idx.numel(), size, size, dtype=dtype, device=g.device)
    for number, own, place in plan.outputs:
        read = right.index_select(1, place).flatten(1)
        product = (left[number * size : (number + 1) * size] @ read).view(size, -1, size).transpose(0, 1)
        found[own] = (product.transpose(1, 2) if plan.rows else product).to(dtype)
    return found * _places(plan.shape, plan.idx, size)[2]


def block_totals(matrix: Tensor, size: int) -> Tensor:
    """Return the sum of each block of a matrix, flat."""
    down, across = grid(tuple(matrix.shape), size)
    padded = F.pad(matrix, (0, across * size - matrix.shape[1], 0, down * size - matrix.shape[0]))
    return padded.view(down, size, across, size).sum((1, 3)).flatten()
