"""A low-rank branch whose down-projection is frozen: the backward pass needs no input, only A x.

    u = x A^T      y' = y + s u B^T      dB = s G^T u      dx = s (G B) A      A (r, in), B (out, r), u (N, r), G (N, out)

Saved for the backward pass: u, and A and B by reference. Dropout costs nothing more: its mask is drawn again from a seed, on u
(`rank`) or on x (`input`). The seed comes from torch's own generator, so a resumed run and a replayed block draw the same mask.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipe.methods._engines.low_rank import LowRank
from llmrecipe.models.autograd_context import AutogradContext

Side = Literal["rank", "input"]
DAMPING = 1e-8
"""Added to the diagonal of A A^T before it is inverted."""


def drawn_mask(x: Tensor, rate: float, seed: int) -> Tensor:
    """Return 1 / (1 - rate) where a number is kept, 0 elsewhere; the same for the same seed, shape and device."""
    generator = torch.Generator(x.device).manual_seed(seed)
    kept = torch.rand(x.shape, generator=generator, device=x.device) >= rate
    return kept.to(x.dtype) / (1.0 - rate)


class _FrozenDownContext(AutogradContext, Protocol):
    scale: float
    drop: tuple[Side, float, int]
    shape: torch.Size
    dtype: torch.dtype


class _FrozenDown(torch.autograd.Function):
    """(x, y, A, B) -> y + s (x A^T) B^T."""

    @staticmethod
    def forward(
        ctx: _FrozenDownContext,
        x: Tensor,
        y: Tensor,
        A: Tensor,
        B: Tensor,
        rows: Tensor | None,
        scale: float,
        drop: tuple[Side, float, int],
    ) -> Tensor:
        side, rate, seed = drop
        if rate and side == "input":
            x = x * drawn_mask(x, rate, seed)
        u = F.linear(x, A.to(x.dtype)).flatten(0, -2)
        if rate and side == "rank":
            u = u * drawn_mask(u, rate, seed)
        ctx.save_for_backward(u, A, B, rows)
        ctx.scale, ctx.drop, ctx.shape, ctx.dtype = scale, drop, x.shape, x.dtype
        flat, up = y.reshape(-1, y.shape[-1]), B.to(u.dtype).t()
        if rows is None:
            return torch.addmm(flat.to(u.dtype), u, up, alpha=scale).view(y.shape)
        return flat.index_add(-1, rows, (u @ up * scale).to(y.dtype)).view(y.shape)

    @staticmethod
    def backward(ctx: _FrozenDownContext, grad: Tensor) -> tuple[Any, ...]:
        u, A, B, rows = ctx.saved_tensors
        side, rate, seed = ctx.drop
        g = grad.reshape(-1, grad.shape[-1])
        g = (g if rows is None else g.index_select(-1, rows)).to(u.dtype)
        dB = (g.t() @ u * ctx.scale).to(B.dtype) if ctx.needs_input_grad[3] else None
        dx = None
        if ctx.needs_input_grad[0]:
            du = g @ B.to(g.dtype) * ctx.scale
            if rate and side == "rank":
                du = du * drawn_mask(du, rate, seed)
            dx = (du @ A.to(g.dtype)).view(ctx.shape).to(ctx.dtype)
            if rate and side == "input":
                dx = dx * drawn_mask(dx, rate, seed)
        return dx, grad if ctx.needs_input_grad[1] else None, None, dB, None, None, None


class FrozenDown(LowRank):
    """The branch at a linear layer, or at some rows of a fused one; A does not train."""

    keeps_input: ClassVar[bool] = False

    def __init__(
        self,
        width_in: int,
        width_out: int,
        r: int,
        scale: float,
        dropout: float = 0.0,
        rows: Tensor | None = None,
        side: Side = "rank",
    ):
        super().__init__(width_in, width_out, r, scale, dropout, rows)
        self.side: Side = side
        self.inverse: tuple[int, int, Tensor] | None = None

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s B A dropout(x), or y + s B dropout(A x), (..., out)."""
        rate = self.dropout if self.training else 0.0
        seed = int(torch.randint(2**62, ())) if rate else 0
        return _FrozenDown.apply(x, y, self.A, self.B, self.rows, self.scale, (self.side, rate, seed))

    def correction(self) -> Tensor:
        """Return s^-2 (A A^T + 1e-8 I)^+ (r, r), worked out once for the A at hand."""
        key = (self.A.data_ptr(), self.A._version)
        if self.inverse is None or self.inverse[:2] != key:
            A = self.A.detach()
            gram = A @ A.t() + DAMPING * torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
            self.inverse = (*key, torch.linalg.pinv(gram) / self.scale**2)
        return self.inverse[2]
