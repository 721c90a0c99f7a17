"""Forms of gradient checkpointing: what of a block waits for the backward pass, and where.

    true        the inputs of each block; all else is computed again
    selective   also what is dear to compute, the results of linear layers and of fused attention; the rest (norms, rotations,
                activations, adapters of low rank) is computed again
    offload     the inputs, in the memory of the machine, from which they come back when their block is computed again

A block is recomputed under the context of its original forward pass and without re-entrance, so frozen inputs need no
gradients and hooks see the same role twice. Gradients are those without recomputation.

Sources: Training Deep Nets with Sublinear Memory Cost (arXiv 1604.06174); Reducing Activation Recomputation in Large
Transformer Models (arXiv 2205.05198), which keeps other results than these.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import activate, checkpoint_contexts, current

if TYPE_CHECKING:
    from llmrecipe.models.pretrained import LanguageModel

PRODUCTS = ("aten::mm", "aten::addmm", "aten::_scaled_mm", "aten::_int_mm", "aten::_grouped_mm")
"""Operations of linear layers. Batched products are left out: where attention is not fused they are its scores, T x T."""
COSTLY = 16
"""A product (m, k) x (k, n) is kept where k is at least n / 16: not the wide result of an adapter of low rank, nor a change of
the size of a weight."""

Contexts = tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]


class Operation(Protocol):
    """An operation as torch dispatches it."""

    def __hash__(self) -> int:
        """Return a hash; each operation is one object."""
        ...

    def name(self) -> str:
        """Return its name, `aten::mm`."""
        ...

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run it."""
        ...


Host = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]
"""What moves a tensor away, and what brings it back."""


def to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """Copy a tensor to the memory of the machine, where it is pinned so that the host does not wait for the copy."""
    host = torch.empty(tensor.size(), dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return tensor.device, host.copy_(tensor, non_blocking=True)


def from_host(packed: tuple[torch.device, Tensor]) -> Tensor:
    """Copy back what `to_host` copied."""
    device, host = packed
    return host.to(device, non_blocking=True)


def enable_checkpointing(model: LanguageModel, form: Literal[True, "selective", "offload"], host: Host | None = None) -> None:
    """Turn on gradient checkpointing of the blocks of a model; call it once.

    Args:
        host: what moves a block's inputs away and back under `offload`; default: to the memory of the machine, from any other.

    Raises:
        ModelError: the family has no checkpointed blocks.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ModelError(f"model.gradient_checkpointing: {type(model).__name__} does not support it; set it to false")
    options = {"use_reentrant": False, "context_fn": selective_contexts if form == "selective" else checkpoint_contexts}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    # Re-entrant checkpointing needs inputs with gradients; ours does not, and they would cost a backward through frozen blocks.
    model.disable_input_require_grads()
    if form == "offload":
        for module in model.modules():
            function: Any = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None:
                module._gradient_checkpointing_func = functools.partial(_offloaded, function, host)  # type: ignore[assignment]


def _offloaded(checkpoint: Callable[..., Any], host: Host | None, function: object, *args: object) -> object:
    """Run a checkpointed block whose first input, the states, rests elsewhere; on a CPU it is where it should be.

    What it shares with other blocks besides that (masks, biases of positions, states of an encoder) stays where it is.
    """
    states = args[0] if args else None
    if not isinstance(states, Tensor) or (host is None and states.device.type == "cpu"):
        return checkpoint(function, *args)
    (away, back), place = host or (to_host, from_host), states.untyped_storage()._cdata

    def pack(tensor: Tensor) -> tuple[bool, Any]:
        moved = tensor.untyped_storage()._cdata == place
        return moved, away(tensor) if moved else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: back(packed[1]) if packed[0] else packed[1]):
        return checkpoint(function, *args)


# --- selective -------------------------------------------------------------------------------------------------------


def selective_contexts() -> Contexts:
    """Return `context_fn` for checkpointing that keeps what is dear to compute."""
    keep = _Keep()
    return keep, _Together(activate(current()), _Reuse(keep.results))


class _Together(contextlib.ExitStack):
    """Several contexts as one, entered in order whenever this one is."""

    def __init__(self, *contexts: contextlib.AbstractContextManager[Any]):
        super().__init__()
        self.contexts = contexts

    def __enter__(self) -> Self:
        for context in self.contexts:
            self.enter_context(context)
        return self


class _Mode(TorchDispatchMode):
    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Leave what is compiled, such as FlexAttention, compiled."""
        return True


class _Keep(_Mode):
    """Keeps results of a block's forward pass.

    torch's own contexts pair the n-th call of an operation in the forward pass with the n-th of the recomputation. A hook that
    remembers what it computed for its weights in the first one makes fewer calls in the second, so results are found by their
    operands here, and what is not found is computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.results: defaultdict[Hashable, deque[Any]] = defaultdict(deque)

    def __torch_dispatch__(
        self, func: Operation, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if _is_kept(func, args, kwargs or {}):
            self.results[_operands(func, args)].append(tree_map_only(Tensor, _Result, result))
            if _watching is not None:
                for tensor in tree_leaves(result):
                    if isinstance(tensor, Tensor):
                        _watching(tensor)
        return result


class _Reuse(_Mode):
    """Gives, while a block is computed again, the results that were kept, each once."""

    def __init__(self, results: Mapping[Hashable, deque[Any]]):
        super().__init__()
        self.results = results

    def __torch_dispatch__(
        self, func: Operation, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if _is_kept(func, args, kwargs or {}) and (found := self.results.get(_operands(func, args))):
            return tree_map_only(_Result, _Result.value, found.popleft())
        return func(*args, **(kwargs or {}))


class _Result:
    """A tensor that is kept."""

    def __init__(self, tensor: Tensor):
        # Below autograd a view has a version of its own unless the key that gives it that of its base is let in.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self.tensor = tensor.detach()
        self.version = self.tensor._version

    def value(self) -> Tensor:
        """Return it.

        Raises:
            RuntimeError: an operation has written into it since.
        """
        if self.tensor._version != self.version:
            raise RuntimeError("a kept result was changed in place; set model.gradient_checkpointing=true")
        return self.tensor


def _operands(operation: Hashable, args: tuple[Any, ...]) -> Hashable:
    """Return what tells the calls of an operation apart: shapes and dtypes, and which parameters take part."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    sources = [x._base if x._base is not None else x for x in tensors]
    known = (id(x) if isinstance(x, nn.Parameter) else None for x in sources)
    return operation, tuple((x.shape, x.dtype) for x in tensors), tuple(known)


def _is_kept(operation: Operation, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the result of an operation waits for the backward pass."""
    kind = _kind(operation)
    if kind == "product":
        first, second = [x for x in args if isinstance(x, Tensor)][-2:]
        return COSTLY * first.shape[-1] >= second.shape[-1]
    # Where attention draws a dropout mask, later draws of the recomputation would be other ones without it.
    return kind == "attention" and not _dropout(operation, args, kwargs)


@functools.cache
def _kind(operation: Operation) -> str:
    """Return whether an operation is a linear layer's product or a forward pass of fused attention, by its name."""
    name = operation.name().partition(".")[0]
    if name in PRODUCTS:
        return "product"
    return "attention" if ("attention" in name or "attn" in name) and "backward" not in name else ""


def _dropout(operation: Operation, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Return the share of its weights that an attention operation drops."""
    names = [argument.name for argument in getattr(getattr(operation, "_schema", None), "arguments", ())]
    return float({**dict(zip(names, args, strict=False)), **kwargs}.get("dropout_p", 0.0))


_watching: Callable[[Tensor], None] | None = None


@contextlib.contextmanager
def noted_results(note: Callable[[Tensor], None]) -> Iterator[None]:
    """Tell, inside, of each tensor that a selective block keeps besides its inputs."""
    global _watching
    before, _watching = _watching, note
    try:
        yield
    finally:
        _watching = before
