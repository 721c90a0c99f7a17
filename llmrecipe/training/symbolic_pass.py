"""One forward and backward pass of a model without its numbers: what it keeps, and the most it holds, to the byte.

Operations on floating-point tensors are carried out on their shapes alone, as on the CPU; those on integers and booleans
(layouts, masks, positions), which decide shapes, really. So a model on the meta device says what it will keep for its backward
pass before a weight is read. What routes tokens by what it computes (experts, a choice of tokens) has no shapes without
numbers.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmrecipe.methods._engines.quantized import bits_of, layers
from llmrecipe.methods.memory.nf4 import BLOCK, SCALE_BLOCK
from llmrecipe.models.pretrained import pretrained
from llmrecipe.training.kept_tensors import KeptTensors

BOOL = torch.bool
DEVICE = torch.ops.prim.device.default
"""The question on which device a tensor is: a third of all that is dispatched."""
INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
"""Operations whose second argument are indices, or masks that say how many entries there are."""


@dataclass(frozen=True)
class PassBytes:
    """Bytes of one forward and backward pass."""

    kept: int
    """Kept for the backward pass, each storage once, without parameters and buffers."""
    logits: int
    """Of these, tensors of the width of the vocabulary."""
    peak: int
    """Most that lived at one time, gradients included, parameters and buffers not."""
    buffers: int = 0
    """Of buffers that the first pass made: the values that a method overwrites in the base."""
    host: int = 0
    """Moved to the memory of the machine until they are used."""


class NumberlessMode(TorchDispatchMode):
    """Carry out operations on shapes alone where floating-point numbers take part, and count the bytes that live."""

    def __init__(self, fake: FakeTensorMode, there: Iterable[Tensor] = ()):
        super().__init__()
        self.fake = fake
        tensors = list(there)
        self.known = {t.untyped_storage()._cdata for t in tensors}
        self.rounds = any(t.is_floating_point() and t.itemsize < 4 for t in tensors)
        self.living: weakref.WeakSet[Any] = weakref.WeakSet()
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        """Run one operation."""
        if func is DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _scalar(args[0], self.rounds)
        leaves = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        real = not any(isinstance(leaf, FakeTensor) for leaf in leaves)
        numbers = any(leaf.is_floating_point() and leaf.dim() for leaf in leaves)
        if real and (cast("torch._ops.OpOverload", func).is_view or not numbers):
            result = func(*args, **(kwargs or {}))
        else:
            if func in INDEXED:
                args = (args[0], _places(args[1]), *args[2:])
            with self.fake:
                result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.known or storage in self.living:
            return
        size = storage.nbytes()
        self.living.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def _scalar(value: FakeTensor, rounds: bool) -> object:
    """Return what a program reads of a number that is not there.

    Questions have the answer they have as a rule, no: is a norm zero, is a value infinite. A floating-point number is NaN, from
    which no size can be made.

    Args:
        rounds: whether weights are of low precision, where the answer may be another one.

    Raises:
        ValueError: an integer, or a question in low precision.
    """
    if value.dtype is BOOL and not rounds:
        return False
    if value.dtype.is_floating_point:
        return float("nan")
    raise ValueError("what is computed depends on rounding" if value.dtype is BOOL else "a size depends on numbers")


class Away:
    """Memory of another place than the device: what is moved there is counted and no longer lives on the device."""

    def __init__(self) -> None:
        self.moved = 0

    def pack(self, tensor: Tensor) -> tuple[Tensor, torch.Size]:
        """Take a tensor's bytes away; what remains is an empty one that knows its kind."""
        self.moved += tensor.nbytes
        return tensor.new_empty(0), tensor.shape

    def unpack(self, packed: tuple[Tensor, torch.Size]) -> Tensor:
        """Return a tensor of the same kind and shape, which lives on the device again."""
        kind, shape = packed
        return kind.new_empty(shape)


def same_kind(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors without numbers have one shape and one dtype."""
    return a.shape == b.shape and a.dtype == b.dtype


def _places(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Return indices with the places of the entries that a mask with numbers marks instead of it."""
    found: list[Tensor | None] = []
    for index in indices:
        mask = index is not None and index.dtype is BOOL and not isinstance(index, FakeTensor)
        found += index.nonzero(as_tuple=True) if mask and index is not None else [index]
    return found


def numberless(model: nn.Module, fake: FakeTensorMode, known: Mapping[str, Tensor]) -> None:
    """Give a model on the meta device, in place, tensors that have shapes and dtypes of a CPU and no numbers.

    Args:
        known: integer buffers that keep their numbers, by name.
    """
    made: dict[int, Tensor] = {}

    def like(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with fake:
                made[id(tensor)] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        return made[id(tensor)]

    dtype = pretrained(model).dtype
    for path, module in model.named_modules():
        if bits_of(module) == 4:
            with fake:
                layers().empty_state(module, dtype, BLOCK, SCALE_BLOCK)
        for name, value in module._buffers.items():
            if value is not None and value.is_meta:
                given = known.get(f"{path}.{name}")
                module._buffers[name] = like(value) if given is None else given
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            own = made.get(-id(parameter))
            if own is None:
                own = nn.Parameter(like(parameter), requires_grad=parameter.requires_grad)
                made[-id(parameter)] = own
            module._parameters[name] = own


def measure_pass(
    model: nn.Module, loss: Callable[[], Tensor], fake: FakeTensorMode, vocabulary: int | None = None
) -> PassBytes:
    """Count what one forward and backward pass keeps and holds.

    Args:
        loss: computes a scalar of the model, whose tensors have no numbers (see `numberless`).
        vocabulary: width by which logits are known.
    """
    there = [*model.parameters(), *model.buffers()]
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng(devices=[]), NumberlessMode(fake, there) as mode, warnings.catch_warnings():
        # A method that compares addresses to see whether a weight was exchanged finds that it was not.
        warnings.simplefilter("ignore")
        with KeptTensors(there, vocabulary) as kept:
            end = loss()
        found = kept.peak, kept.peak_logits
        gradients = torch.autograd.grad(end, trained, allow_unused=True) if end.requires_grad else ()
        del gradients, end
    known = {id(t) for t in there}
    made = sum(b.nbytes for b in model.buffers() if id(b) not in known)
    return PassBytes(*found, mode.peak - made, made)
