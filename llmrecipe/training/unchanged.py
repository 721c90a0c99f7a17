"""Detection of trained tensors that training does not change: their gradient is zero, or their updates round away.

A tensor that autograd never reaches, or a hook that is never called, stops a run at its first step (see `first_step`). A tensor
whose gradient is zero, or whose update is smaller than half a unit in the last place of its dtype, shows only later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmrecipe.training.checksum import named_checksums

if TYPE_CHECKING:
    from llmrecipe.training.run_state import RunState

UPDATES = 20
"""Updates after which a tensor must have changed by at least one bit; fewer in a shorter run."""
SHOWN = 5
"""Names in a warning."""


class UnchangedCheck:
    """Compare the bits of every trained tensor before the first update with those after `min(20, steps)` updates.

    Only 64-bit checksums are kept. Tensors that appear, go or change their shape on the way are left out.
    """

    def __init__(self, run: RunState):
        self.before = named_checksums(trained_tensors(run))
        self.updates = 0
        self.done = False

    def see(self, run: RunState, updated: bool) -> None:
        """Count a step; after the last one of the check, warn of tensors that are what they were.

        Args:
            updated: whether the step made an update; a skipped one changes nothing.
        """
        self.updates += updated
        if self.done or (self.updates < UPDATES and run.progress.step < run.steps):
            return
        self.done = True
        # One update proves nothing: methods that start at the base move one of two factors first.
        if self.updates < 2:
            return
        now = named_checksums(trained_tensors(run))
        both = [name for name in now if name in self.before and name not in run.unread]
        moved: torch.Tensor | list[float] = (
            run.runtime.maximum(torch.tensor([float(now[name] != self.before[name]) for name in both])) if both else []
        )
        still = [name for name, changed in zip(both, moved, strict=True) if not changed and not may_rest(run, name)]
        if still:
            named = ", ".join(still[:SHOWN]) + (f" and {len(still) - SHOWN} more" if len(still) > SHOWN else "")
            run.events.warning(
                f"{len(still)} of {len(both)} trained tensors have not changed by one bit in {self.updates} updates: {named}. "
                "They will be saved as learned, but their gradient is zero or their updates round away; try a larger optim.lr, "
                "float32 weights or another target"
            )


def trained_tensors(run: RunState) -> dict[str, Tensor]:
    """Return what trains, by name."""
    return {name: parameter.detach() for name, parameter in run.model.named_parameters() if parameter.requires_grad}


def may_rest(run: RunState, name: str) -> bool:
    """Return whether a wrapper declares that this tensor of its own may go unused."""
    return any(w.may_skip(name) for w in run.stack if f".{w.name}" in f".{name}" or name in w.opened(run.model))
