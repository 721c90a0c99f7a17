"""Feed-forward layers that compute a few of their positions at a time.

A feed-forward layer works position by position, f(x)[n] = f(x[n]). In chunks of `rows` positions, each computed again when its
turn in the backward pass comes, its wide states (gate, up, their product: 3 x its width a position) exist for one chunk instead
of all N positions. That costs one more forward pass of the layer. Results and gradients are those of the whole up to the order
in which a gradient of weights is summed over chunks.

Source: Reformer (arXiv 2001.04451), section 3.
"""

from __future__ import annotations

import types

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import checkpoint_contexts
from llmrecipe.models.hooks.between_graphs import call_apart
from llmrecipe.models.hooks.hook import hook_kind, hooks_of
from llmrecipe.models.module_map import anatomy

KEY = "runtime.ffn_rows"
ROWS = "_chunk_rows"
"""Attribute of a module that computes in chunks: positions of one."""


def chunk_feed_forward(model: nn.Module, rows: int) -> int:
    """Have the feed-forward layers of a model compute `rows` positions at a time; return how many layers there are.

    Hooks on a layer stay outside the chunks, hooks on the linear layers in it work inside.

    Raises:
        ModelError: no layer of the model works position by position in a module of its own.
    """
    parts = anatomy(model)
    # What a router sends to experts is no layer of every position.
    routed = {(s.side, s.layer) for s in parts.sites if s.role in ("experts", "router")}
    found = {id(s.module): s.module for s in parts.sites if s.role == "mlp" and (s.side, s.layer) not in routed}
    if not found:
        raise ModelError(
            f"{KEY}: {type(model).__name__} has no feed-forward layer that works position by position in a module of its own; "
            "leave the key out"
        )
    for module in found.values():
        module.__dict__[ROWS] = rows
        slot = "_inner_forward" if "_inner_forward" in module.__dict__ else "forward"
        module.__dict__[slot] = types.MethodType(_chunked, module)
    return len(found)


def _chunked(self: nn.Module, *args: Tensor, **kwargs: object) -> Tensor:
    """Compute y = f(x) of x (..., D) chunk by chunk."""
    return call_apart(_in_chunks, self, args, kwargs)


def _in_chunks(self: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> Tensor:
    forward, rows = types.MethodType(type(self).forward, self), self.__dict__[ROWS]
    x = args[0] if args else None
    if x is None or len(args) != 1 or kwargs or x.numel() <= rows * x.shape[-1]:
        return forward(*args, **kwargs)
    _refuse_hooks(self)
    again = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
    found = [
        checkpoint(forward, part[None], use_reentrant=False, context_fn=checkpoint_contexts) if again else forward(part[None])
        for part in x.reshape(-1, x.shape[-1]).split(rows)
    ]
    return torch.cat(found, 1).view(*x.shape[:-1], -1)


def _refuse_hooks(layer: nn.Module) -> None:
    """Refuse hooks inside a layer that depend on where a position is.

    Raises:
        ModelError: naming the wrapper.
    """
    for child in layer.children():
        for module in child.modules():
            for hook in hooks_of(module, active=True):
                if not (hook.rowwise or hook_kind(hook) == "weight"):
                    raise ModelError(
                        f"{KEY}: stack.{hook.owner} changes the feed-forward layer inside by the place of a position, so it "
                        "cannot be computed in chunks; leave the key out"
                    )
