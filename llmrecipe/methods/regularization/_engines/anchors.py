"""Anchors: the values that the weights of the base start from, and what moving away from them costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.methods.selective._engines.sparse_method import base_weights
from llmrecipe.models.hooks.shared_module import SharedModule, add_shared, remove_shared, shared_modules

SEPARATOR = "/"
"""Stands for the dots of a name, which the name of a buffer cannot have."""


class _QuadraticContext(Protocol):
    saved_tensors: tuple[Tensor, ...]
    present: tuple[bool, bool]

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep tensors for the backward pass."""


class _Quadratic(torch.autograd.Function):
    """(w, w_0, f) -> 1/2 sum f (w - w_0)^2; no difference is kept for the backward pass, which forms it again."""

    @staticmethod
    def forward(ctx: _QuadraticContext, weight: Tensor, start: Tensor | None, factor: Tensor | None) -> Tensor:
        ctx.present = (start is not None, factor is not None)
        ctx.save_for_backward(weight, *(t for t in (start, factor) if t is not None))
        moved = _moved(weight, start)
        return 0.5 * (moved.square() if factor is None else moved.square().mul_(factor)).sum()

    @staticmethod
    def backward(ctx: _QuadraticContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *rest = ctx.saved_tensors
        has_start, has_factor = ctx.present
        moved = _moved(weight, rest[0] if has_start else None)
        return ((moved * rest[-1] if has_factor else moved) * grad).to(weight.dtype), None, None


def _moved(weight: Tensor, start: Tensor | None) -> Tensor:
    """Return w - w_0 in float32 at least."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return wide if start is None else wide - start


def quadratic(weight: Tensor, start: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
    """Return 1/2 sum f (w - w_0)^2, a scalar; w_0 is 0 and f is 1 where they are left out.

    Examples:
        >>> w = torch.tensor([3.0, 1.0], requires_grad=True)
        >>> cost = quadratic(w, torch.tensor([1.0, 1.0]), torch.tensor([2.0, 5.0]))
        >>> cost.backward()
        >>> cost.item(), w.grad.tolist()
        (4.0, [4.0, 0.0])
    """
    return _Quadratic.apply(weight, start, factor)


class Anchors(SharedModule):
    """Values by name of the weight they belong to; no part of what is saved with the model.

    Args:
        start: values that the weights start from.
        factor: factors of their entries.
    """

    def __init__(self, start: Mapping[str, Tensor], factor: Mapping[str, Tensor]):
        super().__init__()
        self.start, self.factor = _held(start), _held(factor)
        self.last: dict[str, Tensor] = {}
        """Name -> the newest value of a term, for the metrics of a step."""


def _held(values: Mapping[str, Tensor]) -> nn.Module:
    """Return a module that holds tensors of any name; its buffers are in no state dict."""
    holder = nn.Module()
    for name, value in values.items():
        holder.register_buffer(name.replace(".", SEPARATOR), value, persistent=False)
    return holder


def held_values(holder: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that `_held` put into a module, by name of the weight."""
    return {name.replace(SEPARATOR, "."): value for name, value in holder.named_buffers()}


def place_anchors(model: nn.Module, owner: str, factors: bool) -> None:
    """Copy every weight of the base that can train, in the dtype of its checkpoint where that holds all digits.

    Args:
        factors: also make room for a float32 factor of each entry, zero until it is measured.
    """
    stored = getattr(model, "stored_dtype", None)
    start, factor = {}, {}
    for name, weight in base_weights(model).items():
        value = weight.value.detach()
        if weight.quantized or not value.is_floating_point():
            continue
        narrow = value if stored is None else value.to(stored)
        exact = value.device.type == "meta" or torch.equal(narrow.to(value.dtype), value)
        start[name] = narrow.clone() if exact and narrow.element_size() <= value.element_size() else value.clone()
        if factors:
            factor[name] = torch.zeros_like(value, dtype=torch.promote_types(value.dtype, torch.float32))
    add_shared(model, Anchors(start, factor), owner)


def anchors_of(model: nn.Module, owner: str) -> Anchors | None:
    """Return a wrapper's anchors; None before it is attached and after the end."""
    return next((shared for _, shared in shared_modules(model, owner) if isinstance(shared, Anchors)), None)


def anchored(model: nn.Module, owner: str) -> Iterator[tuple[nn.Parameter, Tensor, Tensor | None]]:
    """Yield (parameter, its start, the factors of its entries) of the weights that are anchored and train.

    Raises:
        ModelError: none of them trains.
    """
    anchors, none = anchors_of(model, owner), True
    start, factor = (held_values(anchors.start), held_values(anchors.factor)) if anchors else ({}, {})
    for name, parameter in model.named_parameters():
        if name in start and parameter.requires_grad:
            none = False
            yield parameter, start[name], factor.get(name)
    if none:
        raise ModelError(f"stack.{owner}: none of the weights that it pulls back to their start trains; leave it out")


def total(terms: list[Tensor]) -> Tensor:
    """Return the sum of scalars, on the device of the first; the parts of a model may lie on several."""
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


class AnchorMethod:
    """The lifecycle of a wrapper that pulls the weights of the base back to their start; mixed into `Wrapper`s."""

    name: str

    def metrics(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the penalty of the step."""
        anchors = anchors_of(model, self.name)
        return dict(anchors.last) if anchors else {}

    def note(self, model: nn.Module, penalty: Tensor) -> None:
        """Keep the penalty of the step for its metrics."""
        if anchors := anchors_of(model, self.name):
            anchors.last["penalty"] = penalty.detach()

    def finish(self, model: nn.Module) -> None:
        """Drop what only training needed."""
        remove_shared(model, self.name)

    def merge(self, model: nn.Module) -> None:
        """Drop what only training needed: weights are trained as they are."""
        self.finish(model)

    def delta(self, model: nn.Module) -> dict[str, Tensor]:
        """Return nothing: what trained is saved with all weights."""
        return {}

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return the bytes of what is kept for each weight of the base."""
        anchors = anchors_of(model, self.name)
        return {"state_bytes": sum(t.nbytes for t in anchors.buffers()) if anchors else 0}

    def describe(self, model: nn.Module) -> Iterator[tuple[str, int]]:
        """Yield how many weights are anchored."""
        anchors = anchors_of(model, self.name)
        yield "weights pulled to their start", sum(t.numel() for t in anchors.start.buffers()) if anchors else 0
