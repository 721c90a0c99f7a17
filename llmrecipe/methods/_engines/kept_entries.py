"""Entries of trained tensors that an optimizer step must not move, nor anything it remembers of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def entries_kept(optimizer: torch.optim.Optimizer, still: Iterable[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Put entries back, with the optimizer state of their shape, after the step taken inside this context.

    An optimizer moves an entry without a gradient too, by its momentum and its decay.

    Args:
        still: parameter and a mask that broadcasts to it, True where it stays as it is.
    """
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for parameter, mask in still:
            state = optimizer.state.get(parameter, {})
            moments = (v for v in state.values() if torch.is_tensor(v) and v.shape == parameter.shape)
            kept += [(tensor, tensor.clone(), mask) for tensor in (parameter.data, *moments)]
    yield
    with torch.no_grad():
        for current, before, mask in kept:
            current.copy_(torch.where(mask, before, current))
