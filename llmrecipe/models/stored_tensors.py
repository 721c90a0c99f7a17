"""Tensors that a file holds, put into a model: of the model's shapes, and no more memory than the file accounts for."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SLACK = 1 << 20
"""Numbers that attaching any stack may take."""


@torch.no_grad()
def copy_saved(model: nn.Module, saved: Mapping[str, Tensor], wanted: Collection[str] = ()) -> None:
    """Copy saved tensors into the parameters and buffers of their names, bit for bit.

    Args:
        wanted: names that must be among them.

    Raises:
        ValueError: one is missing, unknown, or of another shape or kind than the model's.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if missing := sorted(set(wanted) - set(saved)):
        raise ValueError(f"the saved tensors lack {', '.join(missing[:5])}")
    for name, value in saved.items():
        own = state.get(name)
        if own is None:
            raise ValueError(f"the saved tensors hold {name}, which the model does not have")
        if own.shape != value.shape:
            raise ValueError(f"the saved {name} has shape {tuple(value.shape)}, the model's has {tuple(own.shape)}")
        if own.is_floating_point() != value.is_floating_point():
            raise ValueError(f"the saved {name} is of {value.dtype}, the model's of {own.dtype}")
        own.copy_(value)


class _Allocations(TorchDispatchMode):
    """Counts the numbers of all tensors that are made empty or filled, and stops at a bound."""

    MADE = frozenset({"empty", "zeros", "ones", "full", "rand", "randn", "empty_strided", "randint", "new_empty", "new_zeros"})

    def __init__(self, most: int) -> None:
        super().__init__()
        self.left = self.most = most

    def __torch_dispatch__(
        self, func: Any, types: Collection[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.name.removeprefix("aten::") in self.MADE:
            size = next((given for given in args if isinstance(given, list | tuple | torch.Size)), ())
            count = 1
            for length in size:
                count *= int(length)
            self.left -= count
            if self.left < 0:
                raise ValueError(
                    f"its options ask for a tensor of shape {tuple(size)}, more than the {self.most:,} numbers that its file "
                    "and the model account for"
                )
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def within_file(model: nn.Module, saved: Mapping[str, Tensor]) -> Iterator[None]:
    """Bound the tensors that are made inside by what a file holds: its options could name any size.

    Raises:
        ValueError: they have more numbers than the model and four times the file together.
    """
    held = sum(parameter.numel() for parameter in model.parameters()) + 4 * sum(tensor.numel() for tensor in saved.values())
    with _Allocations(held + SLACK):
        yield
