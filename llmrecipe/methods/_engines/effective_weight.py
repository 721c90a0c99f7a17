"""The weight a hook stands on: the host's, as the hooks under it change it.

A method that takes something from the rows of W, as DoRA takes their norm, must see the W whose products it is handed: below it
may lie what an earlier run learned. That is read off the forward pass itself, by sending the identity through it once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from llmrecipe.methods._engines.loftq_codes import Requantized, stored_weight
from llmrecipe.methods._engines.quantized import bits_of
from llmrecipe.models.hooks.hook import Hook, hook_kind, hooks_of
from llmrecipe.models.hooks.host import forward_with, plain_tensors

_READ: MutableMapping[Tensor, frozenset[int]] = WeakIdKeyDictionary()


def weight_below(module: nn.Module, hook: Hook) -> Tensor:
    """Return the weight (out, in) of a linear layer, or (D, V) of an embedding, float32 or wider, below a given hook."""
    under = hooks_under(module, hook)
    with plain_tensors(module):
        if isinstance(module, nn.Embedding):
            return _table(module, under).t()
        if all(isinstance(p, Requantized) for p in under):
            weight = stored_weight(module, torch.float32 if bits_of(module) == 8 else None)
        else:
            weight = _products(module, under)
        return weight.to(torch.promote_types(weight.dtype, torch.float32))


def state_below(module: nn.Module, hook: Hook) -> tuple[tuple[int, int], ...]:
    """Return a key that changes when the host gets another weight, or a hook below this one other tensors.

    Not when entries of the host's weight are trained in place, or a tensor is written through raw memory.
    """
    with plain_tensors(module):
        own: Any = module.weight
    tensors = [t for p in hooks_under(module, hook) for t in (*p.parameters(), *p.buffers())]
    return ((own.data_ptr(), 0), *((t.data_ptr(), t._version) for t in tensors))


def hooks_under(module: nn.Module, hook: Hook) -> list[Hook]:
    """Return the active hooks of a module that change the outputs a hook receives, in stack order."""
    found = []
    for other in hooks_of(module, active=True):
        if other is hook:
            break
        if _apart(other, hook):
            continue
        kind = hook_kind(other)
        inside = kind == "wrap_forward" or (kind == "after" == hook_kind(hook) and other.order <= hook.order)
        if (other.weightlike and inside) or (kind == "weight" and other.tensor == "weight"):
            found.append(other)
    return found


def _apart(one: Hook, other: Hook) -> bool:
    """Return whether two hooks act on different rows of a fused layer."""
    rows = [getattr(p, "rows", None) for p in (one, other)]
    return rows[0] is not None and rows[1] is not None and _numbers(rows[0]).isdisjoint(_numbers(rows[1]))


def _numbers(rows: Tensor) -> frozenset[int]:
    """Return the values of an index that never changes, which are read from its device once."""
    if rows not in _READ:
        _READ[rows] = frozenset(rows.tolist())
    return _READ[rows]


def _products(module: nn.Module, under: list[Hook]) -> Tensor:
    """Return W by its products with the unit vectors, without the bias."""
    weight: Any = module.weight
    width = int(weight.shape[0] if type(module).__name__ == "Conv1D" else module.in_features)  # type: ignore[arg-type]
    dtype = torch.float32 if bits_of(module) is not None else weight.dtype
    with _as_in_evaluation(module, under):
        return forward_with(module, under, torch.eye(width, dtype=dtype, device=weight.device)).t()


def _table(module: nn.Embedding, under: list[Hook]) -> Tensor:
    """Return the rows (V, D) that tokens get, without the family's own factor."""
    weight = module.weight.detach()
    if not under:
        return weight.to(torch.promote_types(weight.dtype, torch.float32))
    ids = torch.arange(module.num_embeddings, device=weight.device)
    with _as_in_evaluation(module, under):
        rows = forward_with(module, under, ids)
    return rows.to(torch.promote_types(rows.dtype, torch.float32)) / float(getattr(module, "scalar_embed_scale", 1.0))


@contextlib.contextmanager
def _as_in_evaluation(module: nn.Module, under: list[Hook]) -> Iterator[None]:
    """Disable dropout and set the bias to zeros."""
    training, bias = [p.training for p in under], module._parameters.get("bias")
    try:
        for hook in under:
            hook.eval()
        if bias is not None:
            module._parameters["bias"] = torch.zeros_like(bias)  # type: ignore[assignment]
        yield
    finally:
        for hook, mode in zip(under, training, strict=True):
            hook.train(mode)
        if bias is not None:
            module._parameters["bias"] = bias
