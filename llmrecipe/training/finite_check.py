"""Detection of trained tensors that are not finite, before anything is saved: a run with such weights never counts as done."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmrecipe.core.errors import RunError
from llmrecipe.models.sharded import local
from llmrecipe.recipe.sharding_rules import PLAIN
from llmrecipe.training.optimizer_state import optimizer_state

if TYPE_CHECKING:
    from llmrecipe.training.run_state import RunState

WINDOW = 100
"""Recent steps whose skipped share is bounded (`run.max_skipped`)."""
SHOWN = 3
"""Tensors named in the message."""


@torch.no_grad()
def nonfinite_names(tensors: Mapping[str, Tensor], order: float = float("inf")) -> list[str]:
    """Return the names of the floating-point tensors whose norm is NaN or infinite.

    The norms are computed where the tensors are, without copying them, and fetched in one transfer per device.

    Args:
        tensors: name -> tensor of any shape and dtype; integers are skipped.
        order: inf finds exactly the tensors that hold a NaN or an infinity; 2 also those whose squares leave float32, which no
            norm, gradient or product of two such tensors survives.
    """
    norms: dict[torch.device, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, tensor in tensors.items():
        value = local(tensor.detach())
        if value.is_floating_point() and value.numel():
            value = value.float() if value.element_size() == 1 else value
            kind = torch.promote_types(value.dtype, torch.float32)
            norms[value.device].append((name, torch.linalg.vector_norm(value, order, dtype=kind).double()))
    found = []
    for named in norms.values():
        finite = torch.stack([norm for _, norm in named]).isfinite().tolist()
        found += [name for (name, _), good in zip(named, finite, strict=True) if not good]
    return found


def check_finite(run: RunState) -> None:
    """Refuse to keep what was learned where a trained weight or the optimizer's state is not finite.

    Raises:
        RunError: naming the tensors; `run.on_nan` does not apply, since there is nothing to continue from.
    """
    weights = run.stack.delta(run.model) | {n: p for n, p in run.model.named_parameters() if p.requires_grad}
    _refuse(run, "trained weights", nonfinite_names(weights, 2.0), len(weights))
    if run.optimizer is not None:
        state, _ = optimizer_state(run.optimizer)
        _refuse(run, "optimizer state", nonfinite_names(state), len(state))


def skip(run: RunState, cause: str) -> None:
    """Count the running step as skipped.

    Args:
        cause: what was not finite, and where its batch is.

    Raises:
        RunError: more than `run.max_skipped` of the recent steps were skipped, one of them always allowed where any is.
    """
    progress, share = run.progress, run.recipe.run.max_skipped
    number = progress.step + 1
    progress.skipped += 1
    progress.skipped_lately = [step for step in progress.skipped_lately if step > number - WINDOW] + [number]
    window = min(WINDOW, run.steps)
    count = len(progress.skipped_lately)
    if count > math.ceil(share * window):
        raise RunError(
            f"{cause}. This is skipped step {count} of the last {min(number, WINDOW)}, and run.max_skipped={share:g} allows "
            f"{math.ceil(share * window)} of {window}: the run does not recover. A lower optim.lr often helps"
        )


def check_updated(run: RunState) -> None:
    """Refuse to finish a run that skipped every step.

    Raises:
        RunError: `run.on_nan: skip` skipped all steps.
    """
    if run.progress.step and run.progress.skipped == run.progress.step:
        raise RunError(
            f"all {run.progress.step} steps had a loss or a gradient that was not finite and were skipped, so nothing was "
            "trained; the batches are in the run directory. A lower optim.lr often helps"
        )


def _refuse(run: RunState, what: str, bad: list[str], count: int) -> None:
    if run.runtime.shard != PLAIN:
        # Each process has looked at its own part.
        bad = list(dict.fromkeys(name for each in run.runtime.gather_json(bad) for name in each))
    if bad:
        named = ", ".join(bad[:SHOWN]) + (", ..." if len(bad) > SHOWN else "")
        raise RunError(
            f"step {run.progress.step}: {what} are not finite, or too large to compute with: {named} ({len(bad)} of {count} "
            "tensors); nothing of this step is kept. A lower optim.lr often helps"
        )
