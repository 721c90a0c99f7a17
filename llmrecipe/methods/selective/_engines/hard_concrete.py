"""Hard-concrete gates over base tensors: the relaxed L0 phase of diff pruning, for entries or for whole groups.

    s = sigma(ln u - ln(1 - u) + alpha),  z = min(1, max(0, s (high - low) + low)),  u ~ U(0, 1)
    W' = W + z w            or  W + z z_g w  with one more gate z_g for the whole tensor
    P(z > 0) = sigma(alpha - ln(-low / high)),  E ||delta||_0 = sum_i P(z_i > 0) [P(z_g > 0)]
    W'_i = W_i + z_j(i) w_i  with one gate for every group j of weights,  E ||delta||_0 = sum_j |j| P(z_j > 0)

u is drawn by address (seed, step, tensor, position): the same in forward, recomputation and backward pass, on every process
and for every micro-batch of a step, which share one W'. The s of entries are kept until its update.
Without gradients z is the gate at u = 1/2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from llmrecipe.core.device_profile import profile_of
from llmrecipe.core.errors import ModelError
from llmrecipe.methods.selective._engines.base_weight import Weight
from llmrecipe.methods.selective._engines.counter_rng import uniform
from llmrecipe.models.autograd_context import AutogradContext
from llmrecipe.models.hooks.hook import DELTA, Hook

if TYPE_CHECKING:
    from llmrecipe.methods.selective._engines.weight_groups import GroupFamily, Member


def cache_parts(flat: Tensor) -> Iterator[slice]:
    """Yield the entries that are worked on at once: on a CPU as many as stay in its cache."""
    size = profile_of(flat.device).decided.entries
    yield from (slice(first, first + size) for first in range(0, flat.numel(), size))


def gate(alpha: Tensor, u: Tensor | None, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return (z, dz / d alpha); u None is u = 1/2."""
    s = torch.sigmoid(alpha if u is None else alpha + torch.logit(u).to(alpha.dtype))
    return (s * (high - low) + low).clamp(0, 1), slopes(s.detach(), low, high)[1]


def openings(s: Tensor, low: float, high: float) -> Tensor:
    """Return z of s, without a graph and with few passes over memory."""
    return s.mul(high - low).add_(low).clamp_(0, 1)


def slopes(s: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return (z, dz / d alpha) of s, likewise."""
    wide = s.mul(high - low)
    z = wide + low
    slope = wide.mul_(1 - s)
    # Zero where z is not strictly inside (0, 1).
    torch.ops.aten.hardtanh_backward.grad_input(slope, z, 0.0, 1.0, grad_input=slope)
    return z.clamp_(0, 1), slope


class Gated(Hook):
    """The dense difference w of one tensor, under gates; replaces W by W + z w for the length of a call."""

    # After selections that are written into W itself (order -1): they must be handed the stored tensor, not a sum.
    order = DELTA
    once_a_step = True

    def __init__(self, weight: Weight, low: float, high: float):
        super().__init__()
        wide = torch.promote_types(weight.value.dtype, torch.float32)
        self.w = nn.Parameter(torch.zeros(weight.shape, dtype=wide, device=weight.value.device))
        self.tensor, self.source, self.low, self.high = weight.owners[0][1], weight.name, low, high
        self.draw = ""
        """Address of the running step's u."""

    def difference(self, draw: str) -> Tensor:
        """Return delta (entries,) for one draw of u."""
        raise NotImplementedError

    def forget(self) -> None:
        """Free what was formed for one step."""

    def merge(self, module: nn.Module) -> None:
        """Refuse: nothing has been pruned yet.

        Raises:
            ModelError: always.
        """
        raise ModelError(f"stack.{self.owner}: the difference has not been pruned yet; train past l0_steps before merging")


class DiffGate(Gated):
    """A gate for every entry, and with `grouped` one more for the whole tensor."""

    def __init__(self, weight: Weight, low: float, high: float, alpha: float | None, grouped: bool):
        super().__init__(weight, low, high)
        start = 0.0 if alpha is None else alpha
        self.alpha = None if alpha is None else nn.Parameter(torch.full_like(self.w, start))
        self.group = nn.Parameter(self.w.new_full((), start)) if grouped and alpha is not None else None
        self.formed: tuple[Any, Tensor] | None = None
        """What the gates of the running step were formed of, and their s (entries,)."""

    def weight(self, value: Tensor) -> Tensor:
        """Return W + z w, summed in float32, of W's shape."""
        return _Gated.apply(value, self.w, self.alpha, self.group, self, torch.is_grad_enabled())

    def uniforms(self, draw: str, first: int, count: int) -> Tensor:
        """Return u of some positions."""
        return uniform(f"{draw}:{self.source}", first, count, self.w.device)

    @torch.no_grad()
    def entry_gates(self, draw: str) -> Tensor:
        """Return s (entries,) for one draw of u; formed once for all micro-batches of a step."""
        assert self.alpha is not None, "without gates there is nothing to form"
        state = (draw, self.alpha.data_ptr(), self.alpha._version)
        if self.formed is None or self.formed[0] != state:
            flat = self.alpha.detach().reshape(-1)
            s = torch.empty_like(flat)
            for part in cache_parts(flat):
                noise = self.uniforms(draw, part.start, flat[part].numel()).logit_().to(flat.dtype)
                torch.add(flat[part], noise, out=s[part]).sigmoid_()
            self.formed = (state, s)
        return self.formed[1]

    def forget(self) -> None:
        """Free the gates of the step."""
        self.formed = None

    def group_gate(self, draw: str | None) -> tuple[Tensor, Tensor]:
        """Return (z_g, its derivative); ones and zeros without a group."""
        if self.group is None:
            one = torch.ones((), dtype=self.w.dtype, device=self.w.device)
            return one, torch.zeros_like(one)
        u = None if draw is None else uniform(f"{draw}:{self.source}:group", 0, 1, self.w.device)[0]
        return gate(self.group.detach(), u, self.low, self.high)

    @torch.no_grad()
    def difference(self, draw: str) -> Tensor:
        """Return delta = z z_g w (entries,) for one draw of u."""
        found = self.w.detach().clone().view(-1)
        if self.alpha is None:
            return found
        flat = self.alpha.detach().view(-1)
        for part in cache_parts(flat):
            u = self.uniforms(draw, part.start, flat[part].numel())
            found[part] *= gate(flat[part], u, self.low, self.high)[0]
        return found * self.group_gate(draw)[0]

    def expected(self, product: bool) -> Tensor:
        """Return E ||delta||_0 of this tensor; `product` as in the paper, else the sum of the authors' code."""
        if self.alpha is None:
            return self.w.new_zeros(())
        shift = math.log(-self.low / self.high)
        own = _Expected.apply(self.alpha, shift)
        if self.group is None:
            return own
        share = torch.sigmoid(self.group - shift)
        return own * share if product else own + share


class GroupGate(Gated):
    """One gate for each group of a family, over the part of the groups in this tensor.

    The first tensor of a family holds its gates `alpha` (groups,); the others read them there.
    """

    slot: Tensor

    def __init__(self, family: GroupFamily, member: Member, low: float, high: float, alpha: float, first: GroupGate | None):
        super().__init__(member.weight, low, high)
        self.family, self.size = family.name, family.size
        self.alpha = nn.Parameter(self.w.new_full((family.count,), alpha)) if first is None else None
        self.pair = [] if first is None else [first]
        self.axis = len(member.weight.shape) - 1 if member.layout == "columns" else 0
        # Rows, columns or entries of no group point past the last gate, at a zero.
        slot = torch.full((member.weight.shape[self.axis],), family.count)
        slot[member.index.reshape(-1)] = torch.arange(family.count).repeat_interleave(member.index.shape[1])
        self.register_buffer("slot", slot.to(self.w.device), persistent=False)

    def weight(self, value: Tensor) -> Tensor:
        """Return W + z w, summed in float32, of W's shape."""
        z = self.spread(self.draw if torch.is_grad_enabled() else None)
        return (value.to(self.w.dtype) + self.w * z).to(value.dtype)

    def spread(self, draw: str | None) -> Tensor:
        """Return the gate of every row, column or entry, shaped to multiply w."""
        alpha = (self.pair[0] if self.pair else self).alpha
        assert alpha is not None, "the first tensor of a family holds its gates"
        u = None if draw is None else uniform(f"{draw}:{self.family}:group", 0, alpha.numel(), alpha.device)
        z = gate(alpha, u, self.low, self.high)[0]
        shape = [1] * self.w.dim()
        shape[self.axis] = -1
        return torch.cat((z, z.new_zeros(1)))[self.slot].view(shape)

    @torch.no_grad()
    def difference(self, draw: str) -> Tensor:
        """Return delta = z_j w (entries,) for one draw of u."""
        return (self.w * self.spread(draw)).view(-1)

    def expected(self) -> Tensor:
        """Return E ||delta||_0 of the entire family where this hook holds its gates, else zero."""
        if self.alpha is None:
            return self.w.new_zeros(())
        return self.size * _Expected.apply(self.alpha, math.log(-self.low / self.high))


class GateTied(Hook):
    """A second user of a gated tensor."""

    order = DELTA
    once_a_step = True

    def __init__(self, first: Gated, tensor: str):
        super().__init__()
        self.pair = [first]
        self.tensor = tensor

    def weight(self, value: Tensor) -> Tensor:
        """Return W + z w of the first user, of W's shape."""
        return self.pair[0].weight(value)

    def merge(self, module: nn.Module) -> None:
        """Refuse, as the first user does."""


class _GatedContext(AutogradContext, Protocol):
    hook: DiffGate
    draw: str | None


class _Gated(torch.autograd.Function):
    """W + z w; z is formed again from s, and s from its address where the step has not kept it, in the backward pass."""

    @staticmethod
    def forward(
        ctx: _GatedContext,
        weight: Tensor,
        w: Tensor,
        alpha: Tensor | None,
        group: Tensor | None,
        hook: DiffGate,
        sample: bool,
    ) -> Tensor:
        draw = hook.draw if sample else None
        ctx.hook, ctx.draw = hook, draw
        ctx.save_for_backward(w, alpha, group)
        shared = hook.group_gate(draw)[0]
        out = torch.empty_like(weight)
        target, base, flat = out.view(-1), weight.reshape(-1), w.reshape(-1)
        for part in cache_parts(flat):
            delta = flat[part]
            if alpha is not None:
                delta = openings(_drawn(hook, draw, alpha, part), hook.low, hook.high).mul_(delta)
            if group is not None and not _known(shared, 1.0):
                delta = delta.mul_(shared)
            torch.add(base[part].to(w.dtype), delta, out=target[part])
        return out

    @staticmethod
    def backward(ctx: _GatedContext, grad: Tensor) -> tuple[Any, ...]:
        w, alpha, group = ctx.saved_tensors
        hook = ctx.hook
        g = grad.reshape(-1)
        below = grad if ctx.needs_input_grad[0] else None
        if alpha is None:
            return below, g.to(w.dtype).view_as(w), None, None, None, None
        shared, slope = hook.group_gate(ctx.draw)
        dw, da = torch.empty_like(w), torch.empty_like(alpha)
        of_group = torch.zeros((), dtype=torch.float64, device=w.device)
        for part in cache_parts(g):
            chunk, own, other = g[part].to(w.dtype), dw.view(-1)[part], da.view(-1)[part]
            z, dz = slopes(_drawn(hook, ctx.draw, alpha, part), hook.low, hook.high)
            torch.mul(chunk, w.view(-1)[part], out=other)
            if group is not None and not _known(slope, 0.0):
                of_group += (other * z).sum(dtype=torch.float64)
            other.mul_(dz)
            torch.mul(chunk, z, out=own)
            if group is not None and not _known(shared, 1.0):
                own.mul_(shared)
                other.mul_(shared)
        dg = None if group is None else (of_group * slope).to(group.dtype)
        return below, dw, da, dg, None, None


def _known(value: Tensor, number: float) -> bool:
    """Return whether one number on the CPU has this value; one on a device would have to be waited for."""
    return value.device.type == "cpu" and float(value) == number


def _drawn(hook: DiffGate, draw: str | None, alpha: Tensor, part: slice) -> Tensor:
    """Return s of some entries: those of the step, or at u = 1/2."""
    return torch.sigmoid(alpha.view(-1)[part]) if draw is None else hook.entry_gates(draw)[part]


class _ExpectedContext(AutogradContext, Protocol):
    shift: float


class _Expected(torch.autograd.Function):
    """sum sigma(alpha - shift), without keeping the probabilities."""

    @staticmethod
    def forward(ctx: _ExpectedContext, alpha: Tensor, shift: float) -> Tensor:
        ctx.save_for_backward(alpha)
        ctx.shift = shift
        flat = alpha.reshape(-1)
        total = torch.zeros((), dtype=torch.float64, device=alpha.device)
        for part in cache_parts(flat):
            total += _probability(flat[part], shift).sum(dtype=torch.float64)
        return total.to(alpha.dtype)

    @staticmethod
    def backward(ctx: _ExpectedContext, grad: Tensor) -> tuple[Any, ...]:
        (alpha,) = ctx.saved_tensors
        found = torch.empty_like(alpha)
        flat, target = alpha.reshape(-1), found.view(-1)
        for part in cache_parts(flat):
            p = _probability(flat[part], ctx.shift)
            torch.mul(p, grad, out=target[part]).mul_(p.neg_().add_(1))
        return found, None


def _probability(alpha: Tensor, shift: float) -> Tensor:
    """Return P(z > 0)."""
    return (alpha - shift).sigmoid_() if shift else torch.sigmoid(alpha)
