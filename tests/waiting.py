"""A device whose values cannot be read: what a step of training waits for, counted without one.

Tensors of the device are those that torch's `FakeTensorMode` computes with (meta): they have a shape, a dtype and a place, and
no values. A fake GPU would be one more name for them, and autograd does not know it where torch was built without one. Tensors
of the host stay real, so what the host computes of its own rows works as ever. Every reading of a value, every operation whose
shape depends on values, and every copy for which the host would have to wait is written down with the line that made it; a
made-up value takes its place, so that one pass finds them all. Only `torch.tensor(numbers, device=...)` is not seen.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_leaves

from llmrecipe.core.registry import PACKAGE

ROOT = f"{PACKAGE}/"
PLACE = torch.device("meta")
aten = torch.ops.aten
SHAPED = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}
"""Operations whose result has a shape that depends on values: the host waits for it."""
COPIES = {aten._to_copy.default, aten.copy_.default}


class Device(TorchDispatchMode):
    """Notes where the host would wait; inside it tensors may be on `PLACE`.

    Attributes:
        waits: (operation, `file:line` of the product) -> how often.
        copies: copies from the device that the host does not wait for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not (_there(kwargs.get("device")) or tree_any(_is_there, (args, kwargs))):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self._note("read", _made_up(args[0].dtype))
        if func in SHAPED:
            return self._shaped(func, args, kwargs)
        if func in COPIES and (found := self._copied(func, args, kwargs)) is not None:
            return found
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default):
            args = (args[0], self._indices(args[1]), *args[2:])
        self._mixed(func, args)
        return func(*args, **kwargs)

    def _note(self, what: str, value: Any = None) -> Any:
        self.waits[what, _line()] += 1
        return value

    def _shaped(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Note it, and give the result the size of the argument."""
        x = args[0]
        name = func.__name__.partition(".")[0]
        if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None:
            return func(*args, **kwargs)
        self._note(name)
        index = torch.zeros(x.numel(), dtype=torch.long, device=PLACE)
        if func is aten.nonzero.default:
            return index[:, None].expand(-1, max(x.dim(), 1)).contiguous()
        if func is aten.masked_select.default:
            return x.flatten()
        if func is aten.bincount.default:
            return torch.zeros(max(kwargs.get("minlength", 0), *args[2:3], 1), dtype=torch.long, device=PLACE)
        if func is aten.repeat_interleave.Tensor:
            return index
        return (x.flatten() if func is not aten.unique_dim.default else x), index, index

    def _copied(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Judge a copy between host and device; None for one within the device."""
        source = args[1] if func is aten.copy_.default else args[0]
        target = args[0].device if func is aten.copy_.default else (kwargs.get("device") or source.device)
        waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if _is_there(source) and torch.device(target).type == "cpu":
            self._note("copy to the host") if waits else self.copies.update([_line()])
            made = torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            return args[0].copy_(made) if func is aten.copy_.default else made
        if not _is_there(source) and _there(target) and waits and source.dim() + source.numel() > 0:
            self._note("copy from the host")
        return None

    def _indices(self, indices: Any) -> list[Any]:
        found: list[Any] = []
        for index in indices:
            if index is None or not _is_there(index):
                if isinstance(index, Tensor):
                    self._note("index of the host")
                found.append(index)
            elif index.dtype in (torch.bool, torch.uint8):
                self._note("index by a mask")
                found += [torch.zeros(index.numel(), dtype=torch.long, device=PLACE)] * index.dim()
            else:
                found.append(index)
        return found

    def _mixed(self, func: Any, args: Any) -> None:
        """Refuse what a device refuses: tensors of the host, other than numbers, among its own."""
        if func in COPIES or func in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default):
            return
        strange = [x for x in tree_leaves(args) if isinstance(x, Tensor) and not _is_there(x) and x.dim()]
        if strange and any(_is_there(x) for x in tree_leaves(args)):
            raise RuntimeError(f"{func}: tensors of the host and of the device: {[tuple(x.shape) for x in strange]}")

    def to(self, module: nn.Module) -> nn.Module:
        """Move a module to the device; shared parameters stay shared."""
        known: dict[int, Tensor] = {}

        def moved(tensor: Tensor) -> Tensor:
            if id(tensor) not in known:
                new = torch.empty(tensor.shape, dtype=tensor.dtype, device=PLACE)
                known[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
                known[id(tensor)].__dict__.update(tensor.__dict__)
            return known[id(tensor)]

        def within(holder: Any) -> None:
            """Move the tensors that objects of the product hold besides parameters and buffers."""
            for name, value in list(vars(holder).items()):
                if isinstance(value, Tensor):
                    object.__setattr__(holder, name, moved(value))
                elif isinstance(value, list) and value and all(isinstance(one, Tensor) for one in value):
                    value[:] = map(moved, value)
                elif type(value).__module__.startswith("llmrecipe") and hasattr(value, "__dict__") and id(value) not in seen:
                    seen.add(id(value))
                    if not isinstance(value, nn.Module):
                        within(value)

        seen: set[int] = set()
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                held.update({name: moved(value) for name, value in held.items() if value is not None})
            if type(part).__module__.startswith("llmrecipe"):
                within(part)
        # Places of tensors in memory name them here, so that none may go.
        self.kept = known, [*module.modules()]
        return module


@contextmanager
def device() -> Iterator[Device]:
    """Enter a context in which tensors may be on a device that has no values."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled

    class Autocast(autocast):  # type: ignore[misc, valid-type]
        def __init__(self, device_type: str, *args: Any, **kwargs: Any):
            super().__init__("cpu" if device_type == PLACE.type else device_type, *args, **kwargs)

    with (
        mock.patch.object(torch, "autocast", Autocast),
        mock.patch.object(torch, "is_autocast_enabled", lambda kind="cpu": enabled("cpu" if kind == PLACE.type else kind)),
        Device() as own,
    ):
        yield own


def _there(place: Any) -> bool:
    return place is not None and torch.device(place).type == PLACE.type


def _is_there(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == PLACE.type


def _made_up(dtype: torch.dtype) -> Any:
    return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1


def _line() -> str:
    """Return `file:line` of the innermost line of the product, or of whoever it called."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT):
            return f"{name.removeprefix(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
