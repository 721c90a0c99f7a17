"""Soft top-k: k of n tokens chosen by a score, with a gradient.

    l = argmax  s . l + e H(l)   subject to   sum l = k, 0 <= l <= 1,   H(l) = - sum l log l

Letters: G groups (sequences), L their longest, k how many are chosen in each. The solution is l_i = min(1, exp((s_i + a) / e)).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmrecipe.models.autograd_context import AutogradContext

FAR = -1e9
"""Score of places that do not exist."""


def soft_top_k(scores: Tensor, k: Tensor, exists: Tensor, eps: float) -> Tensor:
    """Return weights (G, L) in closed form.

    Scores sorted downwards: with m saturated entries a = e (ln(k - m) - logsumexp(s_free / e)); m is the largest number whose
    last entry still has s + a >= 0. Gradient: zero on saturated entries, (diag(l) - l l^T / (k - m)) / e on free ones.

    Args:
        scores: (G, L) in float32 or float64.
        k: (G,) integers; a group of k or fewer has weight one everywhere.
        exists: (G, L) False where a group is shorter than L.
    """
    return _SoftTopK.apply(scores, k, exists, eps)


class _SoftTopKContext(AutogradContext, Protocol):
    eps: float


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _SoftTopKContext, scores: Tensor, k: Tensor, exists: Tensor, eps: float) -> Tensor:
        s = scores.masked_fill(~exists, FAR)
        ranked, order = s.sort(dim=1, descending=True, stable=True)
        z = ranked / eps
        # logsumexp of entry m and everything below it
        rest = z.flip(1).logcumsumexp(1).flip(1)
        m = torch.arange(s.shape[1], device=s.device)
        left = (k[:, None] - m).to(s.dtype)
        a = torch.where(left > 0, left.clamp_min(0.5).log() - rest, torch.full_like(rest, FAR))
        above = torch.roll(z, 1, 1)
        holds = (left > 0) & ((m == 0) | (above + a >= 0))
        saturated = torch.where(holds, m, torch.zeros_like(m)).amax(1, keepdim=True)
        shift = a.gather(1, saturated)
        weight = torch.where(m < saturated, torch.ones_like(z), (z + shift).clamp_max(0).exp())
        out = torch.empty_like(weight).scatter(1, order, weight)
        all_in = k[:, None] >= exists.sum(1, keepdim=True)
        out = torch.where(all_in, torch.ones_like(out), out).masked_fill(~exists, 0.0)
        free = torch.empty_like(order, dtype=torch.bool).scatter(1, order, (m >= saturated).expand_as(order)) & ~all_in & exists
        ctx.save_for_backward(out * free, (k[:, None] - saturated).to(s.dtype))
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: _SoftTopKContext, grad: Tensor) -> tuple[Tensor, None, None, None]:
        free, left = ctx.saved_tensors
        weighted = free * grad
        return (weighted - free * weighted.sum(1, keepdim=True) / left.clamp_min(1.0)) / ctx.eps, None, None, None


def iterated_top_k(
    scores: Tensor, k: Tensor, exists: Tensor, eps: float, start: float = 4.0, decay: float = 0.7, steps: int = 20
) -> Tensor:
    """Return weights (G, L) after some coordinate steps a <- e ln k - e logsumexp((s + b) / e), b <- min(-s - a, 0).

    e falls from `start` by `decay` a step down to `eps`. At small e a few steps are not enough: the weights sum to less than k.
    """
    s = scores.masked_fill(~exists, FAR)
    wanted = k[:, None].to(s.dtype).clamp_min(1.0).log()
    a, b, e = torch.zeros_like(s[:, :1]), torch.zeros_like(s), max(start, eps)
    for _ in range(steps):
        e = max(e * decay, eps)
        a = e * wanted - e * torch.logsumexp((s + b) / e, 1, keepdim=True)
        b = (-s - a).clamp_max(0.0)
    out = ((s + a + b) / e).exp()
    all_in = k[:, None] >= exists.sum(1, keepdim=True)
    return torch.where(all_in, torch.ones_like(out), out).masked_fill(~exists, 0.0)
