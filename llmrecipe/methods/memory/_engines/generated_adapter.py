"""Hooks that read an adapter a hypermodel has written: a low-rank branch, or columns of attention, of its own for each row.

Letters: K adapters, R rows, T tokens, S segments of a packed row, r rank, G key/value heads, P virtual tokens.

`Generator` sits at each stack of blocks and has the adapters written once a forward pass, of encoder and decoder together. The
hooks inside have no tensors of their own. `Context.task_ids` says which of the K adapters a token gets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipe.core.forward_context import Context, activate, current
from llmrecipe.methods._engines.handed_down import handed_down
from llmrecipe.methods._engines.low_rank import branch
from llmrecipe.methods._engines.task_ids import task_ids_for
from llmrecipe.methods.additive._engines.prefix_kv import KeyValueShape, Made
from llmrecipe.methods.memory._engines.hypermodel import Hypermodel
from llmrecipe.models.hooks.hook import DELTA, Hook

T = TypeVar("T")


@dataclass(frozen=True)
class Columns:
    """The blocks that hold the columns of one attention module: its place among them, and its shape."""

    first: int
    """Index of the block of keys; that of values follows."""
    shape: KeyValueShape


def branches(x: Tensor, A: Tensor, B: Tensor, scale: float, y: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return y + scale * B_k A_k x for tokens of several adapters, (R, T, out).

    Args:
        x: (R, T, in)
        A: (K, r, in)
        B: (K, out, r)
        rows: indices of the outputs that are changed; all where None.
    """
    tasks = task_ids_for(x) if len(A) > 1 else None
    if tasks is None:
        return branch(x, A[0], B[0], scale, y, rows)
    A, B = A.to(x.dtype), B.to(x.dtype)
    if current().layout is None:
        own = tasks[:, 0]
        change = x @ A[own].mT @ B[own].mT
    else:
        # Each token through all K pairs of factors, rank by rank, with those of other adapters set to zero.
        h = F.linear(x, A.flatten(0, 1)).unflatten(-1, A.shape[:2])
        h = h * F.one_hot(tasks, len(A)).to(h.dtype)[..., None]
        change = F.linear(h.flatten(-2), B.transpose(0, 1).flatten(1))
    change = (change * scale).to(y.dtype)
    return y + change if rows is None else y.index_add(-1, rows, change)


class GeneratedLowRank(Hook):
    """y + s B_k A_k x at a linear layer, or at some rows of a fused one."""

    order = DELTA
    rows: Tensor | None

    def __init__(self, first: int, scale: float, rows: Tensor | None):
        super().__init__()
        self.first, self.scale = first, scale
        self.register_buffer("rows", rows, persistent=False)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the changed output (R, T, out)."""
        written: Sequence[Tensor] = handed_down(self.owner)
        return branches(x, written[self.first], written[self.first + 1].mT, self.scale, y, self.rows)


class Generator(Hook):
    """Has the adapters written and hands them to the hooks inside its host."""

    def __init__(self, hypermodel: Hypermodel, columns: Mapping[str, Sequence[Columns]] | None = None, gated: bool = False):
        super().__init__()
        # In a list, so that the hypermodel belongs to the model alone and not to every stack of blocks.
        self.hypermodel = [hypermodel]
        self.columns = columns
        if columns is not None and gated:
            zeros = {role: nn.Parameter(hypermodel.queries.new_zeros(len(every))) for role, every in columns.items()}
            self.gates = nn.ParameterDict(zeros)

    def wrap_module(self, call: Callable[..., T], inputs: dict[str, Any]) -> T:
        """Run the host's forward with the adapters in the context."""
        context = current()
        computed = context.computed
        written = None if computed is None else computed.get(self.owner)
        if written is None:
            written = self.hypermodel[0](context.examples)
            if computed is not None:
                computed[self.owner] = written
        handed = written if self.columns is None else self._columns(written, context)
        with activate(dataclasses.replace(context, shared={**context.shared, self.owner: handed})):
            return call(**inputs)

    def _columns(self, written: Sequence[Tensor], context: Context) -> Made:
        assert self.columns is not None, "only prefixes have columns"
        index = adapter_of_rows(context) if len(written[0]) > 1 else None
        made = {role: [_cut(written, c, index) for c in every] for role, every in self.columns.items()}
        gates = dict(self.gates.items()) if hasattr(self, "gates") else {}
        return Made(made, gates)


def adapter_of_rows(context: Context) -> Tensor | None:
    """Return the adapter of each padded row (R,), or of each segment of a packed row (S,); None where the batch names none."""
    tasks = context.task_ids
    if tasks is None:
        return None
    if context.layout is None:
        return tasks[:, 0]
    return tasks[0, [segment.start for segment in context.layout.segments]]


def _cut(written: Sequence[Tensor], columns: Columns, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return keys (1 | R | S, G, P, E) and values (1 | R | S, G, P, Ev) of one attention module."""
    shape, pair = columns.shape, []
    for block in (written[columns.first], written[columns.first + 1]):
        heads = block.unflatten(-1, (shape.heads, -1)).transpose(1, 2)
        pair.append(heads[:1] if index is None else heads[index])
    return pair[0], pair[1]
