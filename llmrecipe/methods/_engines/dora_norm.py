"""Outputs rescaled by a trained magnitude over the norm of the weight's rows, and what that costs in the backward pass.

y = b + g (v - b),  g = m / ||W||        v (..., out) the layer's output, b (out,) its bias, m (out,) the magnitudes
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from llmrecipe.methods._base.late_answers import LateAnswers
from llmrecipe.methods._engines.effective_weight import hooks_under, state_below, weight_below
from llmrecipe.models.autograd_context import AutogradContext

INVERTIBLE = 2.0**-4
"""|g| from which on y - b still has the digits of v - b."""
LEAST = 2.0**-12
"""|g| that the result is divided by where it has become smaller since it was looked at."""


class Rescaled(torch.autograd.Function):
    """y = b + g (v - b) for v (..., out), g (out,), b (out,) or None.

    For dL/dg = sum over tokens of dL/dy (v - b) it keeps its result, from which v - b = (y - b) / g: whatever reads y mostly
    keeps that too, and v or v - b would be kept for nothing else. g must be apart from zero (`INVERTIBLE`).
    """

    @staticmethod
    def forward(v: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        """Return v + (g - 1) (v - b): what g adds to one is not rounded to the digits of one."""
        more = (gain - 1).to(v.dtype)
        y = torch.addcmul(v, v, more)
        return y if bias is None else y.sub_(more * bias)

    @staticmethod
    def setup_context(ctx: AutogradContext, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the result for the backward pass; v is free as soon as nothing else refers to it."""
        ctx.save_for_backward(output, *inputs[1:])

    @staticmethod
    def backward(ctx: AutogradContext, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return dL/dv = g dL/dy, dL/dg = sum dL/dy (y - b) / g, dL/db = (1 - g) sum dL/dy, twice differentiable."""
        y, gain, bias = ctx.saved_tensors
        more, tokens = (gain - 1).to(y.dtype), tuple(range(y.dim() - 1))
        dv = dgain = dbias = None
        if ctx.needs_input_grad[0]:
            dv = torch.addcmul(dy, dy, more)
        if ctx.needs_input_grad[1]:
            scaled = y if bias is None else y - bias
            own = 1 + more.to(gain.dtype)
            dgain = (dy * scaled).sum(tokens, dtype=gain.dtype) / torch.where(own.abs() < LEAST, LEAST, own)
        if ctx.needs_input_grad[2]:
            dbias = (-more * dy.sum(tokens)).to(bias.dtype)
        return dv, dgain, dbias


_training: ContextVar[bool] = ContextVar("llmrecipe_norm_of_training", default=False)
"""Whether a norm is computed for a pass of training, for which the hooks inside run without gradients."""


@contextlib.contextmanager
def _part_of(training: bool) -> Iterator[None]:
    token = _training.set(training)
    try:
        yield
    finally:
        _training.reset(token)


class Gain:
    """What the DoRA hooks share: the magnitude m, the norm it is divided by, and what is cached of them for a step."""

    weightlike = True
    magnitude: nn.Parameter
    host: list[nn.Module]
    detach_norm: bool = True
    stood_on: tuple[Any, Tensor] | None = None
    """(state of the weight below, its ||w||^2)."""
    cached: tuple[Any, Tensor, bool] | None = None
    """(that state and those of the parameters, their norm, whether every g is apart from zero)."""

    @functools.cached_property
    def late(self) -> LateAnswers:
        """Questions about values of the device during training."""
        return LateAnswers()

    def weight_rows(self) -> Tensor:
        """Return rows (out, in) of the W this hook rescales, as the layer and the hooks below use them, float32 or wider."""
        weight = weight_below(self.host[0], self)  # type: ignore[arg-type]
        rows = getattr(self, "rows", None)
        return weight if rows is None else weight[rows]

    def squares(self) -> Tensor:
        """Return (out,) ||w||^2 of each row: a constant, unless a hook below this one learns."""
        if not self.detach_norm and hooks_under(self.host[0], self):  # type: ignore[arg-type]
            return self.weight_rows().square().sum(1)
        key = state_below(self.host[0], self)  # type: ignore[arg-type]
        if self.stood_on is None or self.stood_on[0] != key:
            with torch.no_grad():
                self.stood_on = (key, self.weight_rows().square().sum(1))
        return self.stood_on[1]

    @torch.no_grad()
    def start(self) -> None:
        """Initialize m = ||W|| by the formula that the forward pass uses, so that g is exactly one at step 0."""
        self.magnitude.copy_(self.squares().sqrt())

    def forget(self) -> None:
        """Drop the cached norm: an optimizer may have changed it through raw memory; ||w||^2 too where a hook below learns."""
        self.cached = None
        if not all(p.mounted for p in hooks_under(self.host[0], self)):  # type: ignore[arg-type]
            self.stood_on = None

    def norm(self, product: Callable[[], Tensor] | None) -> Tensor:
        """Return the float32 norm (out,) of each row of the direction."""
        raise NotImplementedError

    def gain(self, product: Callable[[], Tensor] | None = None) -> Tensor:
        """Return (out,) float32 g = m / norm; the norm is a constant to the gradient unless `detach_norm` is off.

        Args:
            product: gives (out, r) W A^T, where the direction learns.
        """
        if not self.detach_norm:
            self.late.training = torch.is_grad_enabled()
            return self.magnitude / self.norm(product)
        own = tuple((p.data_ptr(), p._version) for p in self.parameters(recurse=False))  # type: ignore[attr-defined]
        key = (own, state_below(self.host[0], self))  # type: ignore[arg-type]
        if self.cached is None or self.cached[0] != key:
            self.late.training = torch.is_grad_enabled() or _training.get()
            with torch.no_grad(), _part_of(self.late.training):
                norm = self.norm(product)
                apart = (self.magnitude / norm).abs().min() > INVERTIBLE
                self.cached = (key, norm, self.late.answer("apart", apart))
        return self.magnitude / self.cached[1]

    def rescaled(self, v: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        """Return b + g (v - b), (..., out)."""
        if self.cached is not None and self.cached[2]:
            return Rescaled.apply(v, gain, bias)
        return torch.addcmul(v, v if bias is None else v - bias, (gain - 1).to(v.dtype))
