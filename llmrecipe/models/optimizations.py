"""Optimizations that do not change results: skipping unused computations of a stock model, and fused kernels.

`speed_up(model)` replaces `forward` on instances, never on classes, and calls the `forward` that was there before. Each has
one place among the hooks of its module, whichever came first: rows are selected outside them, norms are computed inside.
A run whose method adds hooks later therefore computes as it does after a resume, when they are there from the start.

- Unused rows. After the last block only the rows whose states are scored matter (the answer's, in fine-tuning), and apart from
  its keys and values that block works row by row. Its query and output projections and its feed-forward therefore run on
  the rows of `Context.read` only; the others are zeros, which are never used. Loss and gradients do not change.
- Root-mean-square norms of the plain form w * x / sqrt(mean(x^2) + eps) go through `torch.nn.functional.rms_norm`: one
  kernel on a GPU instead of several. In low precision on a CPU the stock implementation is faster and stays.

`fused_kernels` adds, where `model.kernels` says so, what a package for it computes.

Each is tested on the given model when it is installed, and removed where the result is not the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import os
import shutil
import types
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.forward_context import Context, activate, current
from llmrecipe.models.hooks.hook import BELOW_OUTERMOST, Hook, hook_kind, hooks_of
from llmrecipe.models.module_map import anatomy
from llmrecipe.models.pretrained import backbone_of, pretrained
from llmrecipe.models.vocabulary import input_embedding

Function = TypeVar("Function", bound=Callable[..., Any])

WORTH = 0.9
"""Rows are selected only where fewer than this share of them is used."""
TOLERANCE = 1e-5
"""Largest difference, relative to the largest value, that counts as equal in float32."""
ROUNDING = 2.0**-7
"""The same where the weights are of lower precision: one unit in the last place of bfloat16."""


def replaces_stock(forward: Function) -> Function:
    """Mark a forward that takes the place of a stock module's, so that `without_speed_ups` finds it."""
    forward.__dict__["replaces_stock"] = True
    return forward


def plain_slot(module: nn.Module) -> str | None:
    """Return the attribute below a module's hooks that a forward goes into; None where something else has replaced it."""
    slot = "_inner_forward" if "_inner_forward" in module.__dict__ else "forward"
    return slot if module.__dict__.get(slot) is None else None


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal up to rounding in their own precision."""
    limit = TOLERANCE if a.dtype in (torch.float32, torch.float64) else ROUNDING
    scale = b.float().abs().max().clamp_min(1e-6)
    return a.shape == b.shape and a.dtype == b.dtype and bool((a.float() - b.float()).abs().max() <= limit * scale)


def speed_up(model: nn.Module, equal: Callable[[Tensor, Tensor], bool] = same) -> list[str]:
    """Install every optimization that is exact on this model; call it once the stack is attached.

    Args:
        equal: compares what the model computes with and without one.

    Returns:
        One line for each installed optimization, for the start of a run.
    """
    if any(p.is_meta for p in model.parameters()):
        return []
    done: list[str] = []
    norms = [m for m in model.modules() if _plain_norm(m, equal)]
    if norms:
        for module in norms:
            slot = "_inner_forward" if "_inner_forward" in module.__dict__ else "forward"
            object.__setattr__(module, slot, types.MethodType(_norm_forward, module))
        done.append(f"{len(norms)} root-mean-square norms in one call each")
    rows = _read_rows(model, equal)
    if rows:
        done.append(f"last block: {', '.join(rows)} only where a state is used")
    return done


@contextlib.contextmanager
def without_speed_ups(model: nn.Module) -> Iterator[None]:
    """Compute inside the context as the stock modules do; what `speed_up` installed comes back afterwards."""
    kept = [
        (module, slot, forward)
        for module in model.modules()
        for slot in ("forward", "_inner_forward")
        if getattr(getattr(forward := module.__dict__.get(slot), "__func__", None), "replaces_stock", False)
    ]
    try:
        for module, slot, _ in kept:
            inner = module.__dict__.get(BELOW_OUTERMOST) if slot == "forward" else None
            if inner is None and slot == "forward":
                del module.__dict__[slot]
            else:
                module.__dict__[slot] = inner
        yield
    finally:
        for module, slot, forward in kept:
            module.__dict__[slot] = forward


def ready_to_compile(device: torch.device) -> None:
    """Check the requirements of `torch.compile`, and keep its notes on recompilation out of the run's output.

    Raises:
        RecipeError: CPU kernels are compiled from C++ and the machine has no compiler.
    """
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if device.type == "cpu" and not any(shutil.which(c) for c in compilers):
        raise RecipeError(f"model.compile: needs a C++ compiler for a CPU ({' or '.join(compilers)}); none is installed here")
    torch._logging.set_logs(dynamo=logging.ERROR, inductor=logging.ERROR)


# --- unused rows -----------------------------------------------------------------------------------------------------


def _read_rows(model: nn.Module, equal: Callable[[Tensor, Tensor], bool]) -> list[str]:
    """Make the last block skip unused rows; return the roles that do."""
    found = _row_modules(model)
    for _, module in found:
        if BELOW_OUTERMOST not in module.__dict__:
            object.__setattr__(module, BELOW_OUTERMOST, module.__dict__.get("forward"))
            module.forward = types.MethodType(_read_rows_forward, module)
    if found and not _same_where_read(model, equal):
        for _, module in found:
            kept = module.__dict__.pop(BELOW_OUTERMOST)
            module.__dict__.pop("forward")
            if kept is not None:
                module.forward = kept
        return []
    return [role for role, _ in found]


def _row_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return modules of the last decoder block that work row by row and whose rows only the final state depends on."""
    try:
        parts = anatomy(model)
    except ModelError:
        return []
    last = [site for site in parts.sites if site.layer == parts.layers - 1]
    roles = {site.role for site in last}
    # Routers count every token; encoders and encoder-decoders use all rows; a fused projection also makes keys and values.
    if parts.encoder_decoder or not parts.causal or roles & {"experts", "router"}:
        return []
    wanted = [site for site in last if site.role in ("attn.q", "attn.o", "mlp") and site.rows is None]
    return [(site.role, site.module) for site in wanted]


@replaces_stock
def _read_rows_forward(self: nn.Module, *args: object, **kwargs: object) -> object:
    """Compute y[read] = f(x[read]), (..., D) -> (..., D'), zero elsewhere; all rows where `Context.read` is unknown."""
    inner = self.__dict__[BELOW_OUTERMOST] or functools.partial(type(self).forward, self)
    context = current()
    if context.read is None or kwargs or len(args) != 1 or not _fits(self, args[0], context.positions, context.read):
        return inner(*args, **kwargs)
    x: Any = args[0]
    rows = context.read
    y = inner(x.reshape(-1, x.shape[-1]).index_select(0, rows)[None])
    flat = y.new_zeros(x.shape[0] * x.shape[1], y.shape[-1])
    return flat.index_copy(0, rows, y[0]).view(*x.shape[:-1], -1)


def _fits(module: nn.Module, x: object, positions: Tensor | None, rows: Tensor) -> bool:
    """Return whether `x` has one row per token, few of them used, and no hook inside depends on the place of its rows."""
    if not isinstance(x, Tensor) or x.dim() != 3 or positions is None or x.shape[:2] != positions.shape:
        return False
    if not 0 < rows.numel() <= WORTH * positions.numel() or torch.compiler.is_compiling():
        return False
    return all(_rowwise(hook) for child in module.modules() for hook in hooks_of(child, active=True))


def _rowwise(hook: Hook) -> bool:
    return hook.rowwise or hook_kind(hook) == "weight"


def probe_ids(model: nn.Module) -> Tensor | None:
    """Return the tokens (1, 8) of a short pass; None of a model that reads none."""
    embedding = input_embedding(pretrained(model))
    if not isinstance(embedding, nn.Embedding):
        return None
    return (torch.arange(3, 11, device=next(model.parameters()).device) % embedding.num_embeddings)[None]


@torch.no_grad()
def _same_where_read(model: nn.Module, equal: Callable[[Tensor, Tensor], bool]) -> bool:
    """Return whether a short pass gives the same final states with and without skipping, at the rows that are used."""
    ids = probe_ids(model)
    if ids is None:
        return False
    device = ids.device
    positions = torch.arange(ids.shape[1], device=device)[None]
    read = torch.tensor([1, 4, 6], device=device)
    training = model.training
    model.eval()
    try:
        states = []
        # Without numbers both passes would give one shape: the one that skips rows shows whether it can be made.
        for rows in (None, read) if equal is same else (read,):
            with activate(dataclasses.replace(Context(), positions=positions, read=rows)):
                out = backbone_of(model)(input_ids=ids, position_ids=positions + getattr(model, "position_offset", 0))
            states.append(out.last_hidden_state[0, read])
        return equal(states[0], states[-1])
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError):
        return False
    finally:
        model.train(training)


# --- norms -----------------------------------------------------------------------------------------------------------


class _Norm(Protocol):
    """What an RMS norm of Transformers holds."""

    weight: Tensor
    variance_epsilon: float


@replaces_stock
def _norm_forward(self: _Norm, hidden_states: Tensor) -> Tensor:
    return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


@torch.no_grad()
def _plain_norm(module: nn.Module, equal: Callable[[Tensor, Tensor], bool]) -> bool:
    """Return whether a module below its hooks is w * x / sqrt(mean(x^2) + eps) and nothing else, tested on seeded rows."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return False
    if plain_slot(module) is None:
        return False
    if set(module._parameters) != {"weight"} or len(list(module.children())) != len(hooks_of(module)):
        return False
    # A norm with a further input, such as a gate, computes something else when it is given one.
    if len(inspect.signature(type(module).forward).parameters) != 2:
        return False
    if weight.dtype != torch.float32 and (not weight.is_floating_point() or weight.device.type == "cpu"):
        return False
    seeded = torch.Generator().manual_seed(0)
    x = (torch.randn(1, 5, weight.shape[0], generator=seeded) * 3).to(weight)
    try:
        return equal(type(module).forward(module, x), F.rms_norm(x, weight.shape, weight, eps))
    except (TypeError, ValueError, RuntimeError):
        return False
