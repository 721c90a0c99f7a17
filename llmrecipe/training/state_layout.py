"""What an optimizer keeps for one parameter: a stored state is compared with it before kernels trust its size.

A fused kernel reads as many numbers of a state as its parameter has, whatever the size of the state.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

SIZES = (3, 5, 7, 11, 13, 17)
"""Of a stand-in's dimensions: none is equal to another, to 1, or to a product of others."""
KNOWN = ("torch", "transformers")
"""Packages whose optimizers keep tensors whose shapes follow from the parameter's alone."""


class StateLayouts:
    """The layouts of one optimizer; parameters of one kind share one."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._known: dict[tuple[int, int, torch.dtype], dict[str, tuple[int, ...] | None]] = {}

    def check(self, index: int, parameter: Tensor, saved: Mapping[str, Any], elsewhere: Collection[str] = ()) -> None:
        """Compare what was saved of a parameter with what the optimizer keeps for it.

        Args:
            index: the parameter's group.
            elsewhere: parts of the state that are stored, and read, in another way.

        Raises:
            ValueError: naming the part that is missing, unknown, or of another shape or kind.
        """
        own = self.optimizer.state.get(parameter) or {}
        # One that has allocated its own fills that; others are known by what a step on a small tensor makes.
        wanted = {k: tuple(v.shape) if isinstance(v, Tensor) else None for k, v in own.items()} or self._of(index, parameter)
        if not wanted:
            return
        whose = f"of a parameter of shape {tuple(parameter.shape)}"
        unlike = sorted(wanted.keys() ^ {*saved, *elsewhere})
        if unlike:
            raise ValueError(f"the state {unlike[0]} {whose} {'is missing' if unlike[0] in wanted else 'is none of its'}")
        for key, value in saved.items():
            shape = wanted[key]
            if not isinstance(value, Tensor):
                if shape is not None:
                    raise ValueError(f"the state {key} {whose} is {value!r:.60}, no tensor")
            elif tuple(value.shape) != shape or (value.dtype != own[key].dtype if own else not value.is_floating_point()):
                raise ValueError(f"the state {key} {whose} is of {value.dtype} and shape {tuple(value.shape)}")
            elif not value.ndim and not bool(torch.isfinite(value)):
                raise ValueError(f"the state {key} {whose} is {value.item()}")

    def _of(self, index: int, parameter: Tensor) -> dict[str, tuple[int, ...] | None]:
        """Return the shape of each tensor, None for a number; nothing where shapes do not follow from the parameter's."""
        key = index, parameter.dim(), parameter.dtype
        if key not in self._known:
            self._known[key] = self._of_stand_in(index, parameter)
        sizes = {1: 1, **dict(zip(SIZES, parameter.shape, strict=False))}
        return {k: s if s is None else tuple(sizes[size] for size in s) for k, s in self._known[key].items()}

    def _of_stand_in(self, index: int, parameter: Tensor) -> dict[str, tuple[int, ...] | None]:
        group = self.optimizer.param_groups[index]
        parts = getattr(self.optimizer, "parts", [self.optimizer])
        kind: Any = type(next(part for part in parts if any(own is group for own in part.param_groups)))
        if kind.__module__.partition(".")[0] not in KNOWN or parameter.dim() > len(SIZES):
            return {}
        shape = SIZES[: parameter.dim()]
        small = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device, requires_grad=True)
        small.grad = torch.ones_like(small)
        made = kind([{**group, "params": [small], "names": ["small"]}])
        made.step()
        found = {key: tuple(value.shape) if isinstance(value, Tensor) else None for key, value in made.state[small].items()}
        return found if {size for s in found.values() if s for size in s} <= {1, *shape} else {}
