"""The sparse-delta engine: selected entries of base weights are the parameters, everything else is not.

    W' = W + scatter(values, idx)      d L / d values_j = sum_m G[m, r_j] X[m, c_j]

`idx` names the entries (sorted flat indices), the rows, the columns or the blocks of a stored tensor; `values` is their
trained float32 delta, zero at the start. Optimizer state, gradients and checkpoints have the size of `values`, and an entry
that was not selected cannot move: it is no parameter of anything. Letters: M tokens, G (M, out) gradient of a layer's output,
X (M, in).

Modes
    inplace   W[idx] <- W_0[idx] + values whenever `values` changed; W_0[idx] is kept, so switching off is exact to the bit
    vector    one-dimensional tensors: W + scatter(values) for the length of a call
    term      quantized linears: y = F(x) + S x with S sparse (o, i); W is not touched

Kernels of the gradient
    direct      entries: chunks of (G[:, r] * X[:, c]).sum(0); rows and columns: G[:, rows]^T X and G^T X[:, columns];
                blocks: G[:, a]^T X[:, b] for each chosen (a, b), with a copy of the columns of X that any block reads;
                embeddings: gradients summed by token id, at the tokens of the batch only
    transient   the layer's whole dW, gathered and dropped at once: dense selections, 3-D experts, anything that is no linear
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.methods.selective._engines.base_weight import Selected, Weight
from llmrecipe.methods.selective._engines.blocks import (
    BlockPlan,
    block_gradient,
    block_plan,
    block_size,
    kept_features,
)
from llmrecipe.methods.selective._engines.sparse_kernels import (
    Layout,
    embedding_gradient,
    gather_selected,
    product_gradient,
    put,
    selected_shape,
)
from llmrecipe.models.autograd_context import AutogradContext
from llmrecipe.models.hooks.hook import Hook

Mode = Literal["inplace", "vector", "term"]

DIRECT_BELOW = 0.01
"""Share of a matrix up to which gathering products beats forming dW (measured equal between 0.5 and 1 % on one CPU thread)."""


@dataclass
class SelectionWriter:
    """Writes the selections of one tensor, in the order in which they were made; several wrappers may select the same entry.

    Every write rounds, so a saved selection keeps its place: a reloaded model then has the same weights to the bit.
    """

    hooks: list[SparseDelta] = field(default_factory=list)
    written: Any = None

    def last(self) -> int:
        """Return the last place that is taken, -1 where there is none."""
        return max((hook.place for hook in self.hooks), default=-1)

    def add(self, hook: SparseDelta) -> None:
        """Add a selection at its place."""
        self.hooks.append(hook)
        self.hooks.sort(key=lambda one: one.place)

    @torch.no_grad()
    def sync(self, weight: Tensor, on: tuple[bool, ...]) -> None:
        """Write the deltas of the active hooks into the tensor.

        What was written is identified by address and version of each `values`, so nothing is copied while nothing changes.
        """
        state = (weight.data_ptr(), *(p.stamp() if active else None for p, active in zip(self.hooks, on, strict=True)))
        if state == self.written:
            return
        # Through `.data`: a graph that saved W is not invalidated, the guard of each call puts the right W back for it.
        raw = weight.data
        alone = len(self.hooks) == 1 and self.hooks[0].base is not None
        if not alone or not on[0]:
            for hook in reversed(self.hooks):
                if hook.base is not None:
                    put(raw, hook.layout, hook.idx, hook.base)
                    hook.base = None
        for hook, active in zip(self.hooks, on, strict=True):
            if active:
                if hook.base is None:
                    hook.base = gather_selected(raw, hook.layout, hook.idx)
                put(raw, hook.layout, hook.idx, (hook.base.to(hook.values.dtype) + hook.values).to(raw.dtype))
        self.written = state


class SparseDelta(Hook):
    """Holds the selection of one tensor and puts it into effect where the tensor is used."""

    order = -1
    idx: Tensor
    base: Tensor | None
    planned: tuple[tuple[int, int, bool], BlockPlan] | None = None

    def __init__(self, weight: Weight, chosen: Selected, tensor: str, mode: Mode, writer: SelectionWriter):
        super().__init__()
        device = weight.value.device
        wide = torch.float64 if weight.value.dtype == torch.float64 else torch.float32
        kind = torch.int32 if weight.numel < 2**31 else torch.int64
        shape = selected_shape(weight.shape, chosen.layout, chosen.idx.numel())
        self.values = nn.Parameter(torch.zeros(shape, dtype=wide, device=device))
        self.register_buffer("idx", chosen.idx.to(device=device, dtype=kind))
        self.register_buffer("base", None, persistent=False)
        self.layout: Layout = chosen.layout
        self.shape = weight.shape
        self.tensor = tensor
        self.source = weight.name
        self.expected = chosen.base
        self.mode: Mode = mode
        self.in_place = mode == "inplace"
        self.kernel = "transient"
        self.writer = writer
        self.place = writer.last() + 1 if chosen.place is None else chosen.place
        if mode == "inplace":
            writer.add(self)

    def base_due(self, weight: Tensor) -> int:
        """Return the bytes of W_0[idx] that the first forward pass will keep: none where it is kept, or W is not touched."""
        return self.values.numel() * weight.element_size() if self.mode == "inplace" and self.base is None else 0

    def active(self) -> bool:
        """Return True: while disabled, it has to put the base back."""
        return True

    def on(self) -> bool:
        """Return whether the running forward pass sees the delta."""
        return super().active()

    def blocks(self, rows: bool) -> BlockPlan:
        """Return how the gradient of chosen blocks is formed, made again where the indices have changed."""
        key = (self.idx.data_ptr(), self.idx._version, rows)
        if self.planned is None or self.planned[0] != key:
            self.planned = key, block_plan(self.idx, self.shape, block_size(self.layout), rows)
        return self.planned[1]

    def stamp(self) -> tuple[int, int]:
        """Return a key that changes whenever `values` does."""
        return self.values.data_ptr(), self.values._version

    @torch.compiler.disable
    def sync(self, weight: Tensor, on: tuple[bool, ...] | None = None) -> None:
        """Write what the running forward pass should see."""
        self.writer.sync(weight, self.flags() if on is None else on)

    def flags(self) -> tuple[bool, ...]:
        """Return which selections of this tensor the running forward pass sees."""
        return tuple(hook.on() for hook in self.writer.hooks)

    def weight(self, value: Tensor) -> Tensor:
        """Return W with the delta in it, of W's shape."""
        return self.serve(value, self.kernel)

    def serve(self, value: Tensor, kernel: str) -> Tensor:
        """Return the tensor that one of its users computes with."""
        if self.mode == "vector":
            if not self.on():
                return value
            return value.to(self.values.dtype).index_add(0, self.idx, self.values).to(value.dtype)
        if self.mode == "inplace":
            self.sync(value)
            if kernel == "transient" and self.on() and torch.is_grad_enabled() and self.values.requires_grad:
                return _Transient.apply(value, self.values, self.idx, self.layout)
        return value

    @torch.no_grad()
    def merge(self, module: nn.Module) -> None:
        """Set W <- W + scatter(values), rounded once to W's dtype.

        Raises:
            ModelError: the weight is quantized.
        """
        weight = getattr(module, self.tensor)
        if self.mode == "term":
            if not weight.is_floating_point() or hasattr(weight, "quant_state"):
                raise ModelError(f"{self.source}: entries cannot be merged into a quantized weight; dequantize the model first")
            put(
                weight.data,
                self.layout,
                self.idx,
                (gather_selected(weight.data, self.layout, self.idx) + self.values).to(weight.dtype),
            )
        elif self.mode == "vector":
            weight.data = self.serve(weight.data, "").detach()
        else:
            written = self.writer.written
            if written is None or written[0] == weight.data_ptr():
                self.sync(weight)
                self.writer.written = None
            elif self.base is None:
                put(
                    weight.data,
                    self.layout,
                    self.idx,
                    (gather_selected(weight.data, self.layout, self.idx) + self.values).to(weight.dtype),
                )
            # Else another method has folded itself into a W that held these deltas already: `base` is no longer below them.
            self.writer.hooks.remove(self)


class SparseTied(Hook):
    """A second user of a tensor whose selection lives at the first."""

    order = -1

    def __init__(self, first: SparseDelta, tensor: str):
        super().__init__()
        # In a list, so that the values are not registered twice.
        self.pair = [first]
        self.tensor = tensor
        self.kernel = "transient"

    def active(self) -> bool:
        """Return True, as the first user does."""
        return True

    def weight(self, value: Tensor) -> Tensor:
        """Return W with the first user's delta in it, of W's shape."""
        return self.pair[0].serve(value, self.kernel)

    def merge(self, module: nn.Module) -> None:
        """Do nothing: the tensor is merged once, at its first user."""


class SparseGradient(Hook):
    """Forms the gradient of the values at one user, adds the term of quantized linears, and guards W for the backward pass."""

    order = -1

    def __init__(self, first: SparseDelta, kind: str, padding: int | None = None, host: Tensor | None = None):
        super().__init__()
        self.pair = [first]
        self.kind = kind
        """`linear`, `conv1d`, `embedding` or `other` (transient: nothing to form here)."""
        self.padding = padding
        self.host = [] if host is None else [host]
        """The tensor that is written in place, if it is."""

    def active(self) -> bool:
        """Return True: a pass without the delta must be guarded too."""
        return True

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y, or y + S x in term mode, (..., out)."""
        hook = self.pair[0]
        on = hook.on()
        if on and hook.mode == "term":
            return _Term.apply(x, y, hook.values, hook.idx, hook)
        if not y.requires_grad and not (on and torch.is_grad_enabled() and hook.values.requires_grad):
            return y
        if on and self.kind != "other" and hook.values.requires_grad:
            y = _Direct.apply(x, y, hook.values, hook.idx, hook, self.kind, self.padding)
        if y.requires_grad and self.host:
            flags, weight = hook.flags(), self.host[0]
            y.register_hook(lambda _: hook.sync(weight, flags))
        return y

    def merge(self, module: nn.Module) -> None:
        """Do nothing: there is nothing of its own to fold."""


class _TransientContext(AutogradContext, Protocol):
    layout: Layout
    dtype: torch.dtype


class _Transient(torch.autograd.Function):
    """W -> W; the dense dW of the layer is gathered, and dropped unless W itself needs it."""

    @staticmethod
    def forward(ctx: _TransientContext, weight: Tensor, values: Tensor, idx: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(idx)
        ctx.layout, ctx.dtype = layout, values.dtype
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: _TransientContext, grad: Tensor) -> tuple[Any, ...]:
        # A second selection of the tensor, or a pass that scores it, waits for W.
        below = grad if ctx.needs_input_grad[0] else None
        return below, gather_selected(grad, ctx.layout, ctx.saved_tensors[0]).to(ctx.dtype), None, None


class _DirectContext(AutogradContext, Protocol):
    hook: SparseDelta
    kind: str
    padding: int | None
    cut: bool


class _Direct(torch.autograd.Function):
    """y -> y; dW is formed at the selection only."""

    @staticmethod
    def forward(
        ctx: _DirectContext,
        x: Tensor,
        y: Tensor,
        values: Tensor,
        idx: Tensor,
        hook: SparseDelta,
        kind: str,
        padding: int | None,
    ) -> Tensor:
        ctx.cut = hook.layout == ("columns" if kind == "linear" else "rows") and kind != "embedding"
        # Where the selection is on the input's side, only those features are kept for the backward pass.
        if block_size(hook.layout):
            kept = kept_features(x, hook.blocks(kind == "conv1d"))
        else:
            kept = x.index_select(-1, idx) if ctx.cut else x
        ctx.save_for_backward(kept, idx)
        ctx.hook, ctx.kind, ctx.padding = hook, kind, padding
        return y.view_as(y)

    @staticmethod
    def backward(ctx: _DirectContext, grad: Tensor) -> tuple[Any, ...]:
        x, idx = ctx.saved_tensors
        hook, g = ctx.hook, grad.reshape(-1, grad.shape[-1])
        if ctx.kind == "embedding":
            found = embedding_gradient(x.reshape(-1), g, idx, hook.layout, hook.shape, hook.values.dtype, ctx.padding)
        elif block_size(hook.layout):
            found = block_gradient(x, g, hook.blocks(ctx.kind == "conv1d"), hook.values.dtype)
        else:
            x = x.reshape(-1, x.shape[-1])
            a, b = (x, g) if ctx.kind == "conv1d" else (g, x)
            found = product_gradient(a, b, idx, hook.layout, hook.shape, hook.values.dtype, ctx.cut)
        return None, grad, found, None, None, None, None


class _TermContext(AutogradContext, Protocol):
    hook: SparseDelta


class _Term(torch.autograd.Function):
    """y + S x for a sparse S (o, i); the product runs in the dtype of the values."""

    @staticmethod
    def forward(ctx: _TermContext, x: Tensor, y: Tensor, values: Tensor, idx: Tensor, hook: SparseDelta) -> Tensor:
        ctx.save_for_backward(x, values, idx)
        ctx.hook = hook
        flat = x.reshape(-1, x.shape[-1]).to(values.dtype)
        added = torch.sparse.mm(_matrix(values, idx, hook), flat.t()).t()
        return (y.to(values.dtype) + added.view(y.shape)).to(y.dtype)

    @staticmethod
    def backward(ctx: _TermContext, grad: Tensor) -> tuple[Any, ...]:
        x, values, idx = ctx.saved_tensors
        g, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        gx = None
        if ctx.needs_input_grad[0]:
            matrix = _matrix(values, idx, ctx.hook)
            gx = torch.sparse.mm(matrix.t(), g.to(values.dtype).t()).t().reshape(x.shape).to(x.dtype)
        return gx, grad, product_gradient(g, flat, idx, ctx.hook.layout, ctx.hook.shape, values.dtype), None, None


def _matrix(values: Tensor, idx: Tensor, hook: SparseDelta) -> Tensor:
    """Return the sparse matrix (o, i) of a selection."""
    rows, columns = hook.shape
    if hook.layout == "entries":
        flat = idx.long()
        where = torch.stack((flat // columns, flat % columns))
    else:
        other = torch.arange(columns if hook.layout == "rows" else rows, device=idx.device)
        pair = (idx.long(), other) if hook.layout == "rows" else (other, idx.long())
        where = torch.cartesian_prod(*pair).t()
    return torch.sparse_coo_tensor(
        where, values.detach().reshape(-1), (rows, columns), is_coalesced=True, check_invariants=False
    )
