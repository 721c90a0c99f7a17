"""Speed without a change of results: what a stock model computes although nobody reads it, or in more steps than needed.

`speed_up(model)` replaces `forward` on instances, never on classes, and keeps whatever it finds there underneath.

- Unread rows. After the last block only the rows whose states are scored matter (the answer's, in fine-tuning), and past
  its keys and values that block works row by row. Its query and output projections and its feed-forward therefore run on
  the rows of `Context.read` only; the others come out as zeros, which nobody reads. Loss and gradients stay what they were.
- Root-mean-square norms of the plain form w * x / sqrt(mean(x^2) + eps) go through `torch.nn.functional.rms_norm`: one
  kernel on a GPU instead of a chain of them. In low precision on a CPU the stock chain is the faster one and stays.

Each is tried on the model at hand when it is installed, and taken back where the result is not the same.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.forward_context import activate, current
from llmrecipe.models.hooks.hook import Hook, hooks_of, kind_of

WORTH = 0.9
"""Rows are picked out only where fewer than this share of them is read."""
TOLERANCE = 1e-5
"""Largest difference, relative to the largest value, that counts as equal in float32."""
ROUNDING = 2.0**-7
"""The same where the weights are of lower precision: one unit in the last place of bfloat16."""


def speed_up(model: nn.Module) -> list[str]:
    """Install every trick that holds on this model; call it once the stack is attached.

    Returns:
        One line for each trick in place, for the start of a run.
    """
    if any(p.is_meta for p in model.parameters()):
        return []
    done: list[str] = []
    norms = [m for m in model.modules() if _plain_norm(m)]
    if norms:
        for module in norms:
            module.forward = types.MethodType(_norm_forward, module)  # type: ignore[method-assign]
        done.append(f"{len(norms)} root-mean-square norms in one call each")
    rows = _read_rows(model)
    if rows:
        done.append(f"last block: {', '.join(rows)} only where a state is read")
    return done


def ready_to_compile(device: torch.device) -> None:
    """Look for what `torch.compile` needs, and keep its notes on recompilation out of the run's output.

    Raises:
        RecipeError: kernels for a CPU are written in C++ and the machine has no compiler.
    """
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if device.type == "cpu" and not any(shutil.which(c) for c in compilers):
        raise RecipeError(f"model.compile: needs a C++ compiler for a CPU ({' or '.join(compilers)}); none is installed here")
    torch._logging.set_logs(dynamo=logging.ERROR, inductor=logging.ERROR)


# --- rows that nobody reads ------------------------------------------------------------------------------------------


def _read_rows(model: nn.Module) -> list[str]:
    """Make the last block skip unread rows; returns the roles that do."""
    found = _row_modules(model)
    for _, module in found:
        if "_every_row" not in module.__dict__:
            object.__setattr__(module, "_every_row", module.__dict__.get("forward"))
            module.forward = types.MethodType(_read_rows_forward, module)  # type: ignore[method-assign]
    if found and not _same_where_read(model):
        for _, module in found:
            kept = module.__dict__.pop("_every_row")
            module.__dict__.pop("forward")
            if kept is not None:
                module.forward = kept  # type: ignore[method-assign]
        return []
    return [role for role, _ in found]


def _row_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules of the last decoder block that work row by row and whose rows only the final state depends on."""
    from llmrecipe.models.module_map import anatomy

    try:
        parts = anatomy(model)
    except ModelError:
        return []
    last = [site for site in parts.sites if site.layer == parts.layers - 1]
    roles = {site.role for site in last}
    # Routers count every token; encoders and pairs of them read rows elsewhere; a fused projection also makes keys and values.
    if parts.encoder_decoder or not parts.causal or roles & {"experts", "router"}:
        return []
    wanted = [site for site in last if site.role in ("attn.q", "attn.o", "mlp") and site.rows is None]
    return [(site.role, site.module) for site in wanted]


def _read_rows_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """y[read] = f(x[read]), zero elsewhere; every row where it is not known what is read."""
    inner = self.__dict__["_every_row"] or types.MethodType(type(self).forward, self)
    context = current()
    if context.read is None or kwargs or len(args) != 1 or not _fits(self, args[0], context.positions, context.read):
        return inner(*args, **kwargs)
    x, rows = args[0], context.read
    y = inner(x.reshape(-1, x.shape[-1]).index_select(0, rows)[None])
    flat = y.new_zeros(x.shape[0] * x.shape[1], y.shape[-1])
    return flat.index_copy(0, rows, y[0]).view(*x.shape[:-1], -1)


def _fits(module: nn.Module, x: Any, positions: Tensor | None, rows: Tensor) -> bool:
    """Whether `x` holds one row a token of the batch, few of them read, and no hook inside minds where its rows are."""
    if not isinstance(x, Tensor) or x.dim() != 3 or positions is None or x.shape[:2] != positions.shape:
        return False
    if not 0 < rows.numel() <= WORTH * positions.numel() or torch.compiler.is_compiling():
        return False
    return all(_rowwise(hook) for child in module.modules() for hook in hooks_of(child, active=True))


def _rowwise(hook: Hook) -> bool:
    return hook.rowwise or kind_of(hook) == "weight"


@torch.no_grad()
def _same_where_read(model: nn.Module) -> bool:
    """Whether a short pass gives the same final states with and without skipping, at the rows that are read."""
    from llmrecipe.core.forward_context import Context

    device = next(model.parameters()).device
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    ids = (torch.arange(3, 11, device=device) % vocabulary)[None]
    positions = torch.arange(ids.shape[1], device=device)[None]
    read = torch.tensor([1, 4, 6], device=device)
    training = model.training
    model.eval()
    try:
        states = []
        for rows in (None, read):
            with activate(dataclasses.replace(Context(), positions=positions, read=rows)):
                out = model.base_model(input_ids=ids, position_ids=positions + getattr(model, "position_offset", 0))
            states.append(out.last_hidden_state[0, read])
        return same(*states)
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError):
        return False
    finally:
        model.train(training)


# --- norms -----------------------------------------------------------------------------------------------------------


def _norm_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


@torch.no_grad()
def _plain_norm(module: nn.Module) -> bool:
    """Whether a module is w * x / sqrt(mean(x^2) + eps) and nothing else, tried on seeded rows."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float) or "forward" in module.__dict__:
        return False
    if set(module._parameters) != {"weight"} or list(module.children()):
        return False
    if weight.dtype != torch.float32 and (not weight.is_floating_point() or weight.device.type == "cpu"):
        return False
    seeded = torch.Generator().manual_seed(0)
    x = (torch.randn(1, 5, weight.shape[0], generator=seeded) * 3).to(weight)
    try:
        return same(module(x), F.rms_norm(x, weight.shape, weight, eps))
    except (TypeError, ValueError, RuntimeError):
        return False


def same(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding of the tensors' own precision."""
    limit = TOLERANCE if a.dtype in (torch.float32, torch.float64) else ROUNDING
    scale = b.float().abs().max().clamp_min(1e-6)
    return a.shape == b.shape and a.dtype == b.dtype and bool((a.float() - b.float()).abs().max() <= limit * scale)
