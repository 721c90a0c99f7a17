"""Proof, after the first update of every run with `runtime.shard`, that each process holds no more than its part.

What a process keeps is counted in memory (each storage once, padding included) and compared with the formula of the stage:

    zero1        gradients and parameters whole; of the states those of the tensors it steps
    zero2, zero3 of a tensor with n rows that N processes divide, ceil(n / N) rows of parameter, gradient and states

A padded row counts, so a tensor of fewer rows than processes takes one row on each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from llmrecipe.core.errors import ProofError
from llmrecipe.models.sharded import is_sharded, local

if TYPE_CHECKING:
    from llmrecipe.training.run_state import RunState

SHARE = 0.01
"""Most that counted and predicted bytes may differ by."""


@dataclass(frozen=True)
class Bytes:
    """Bytes of a training, without what a pass makes and frees."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.parameters + self.gradients + self.optimizer


def prove(run: RunState) -> dict[str, Any]:
    """Count what this process holds after an update, while gradients exist; return the facts of all processes.

    Raises:
        ProofError: a process holds other bytes than its stage gives it.
    """
    own, wanted, undivided = held_bytes(run), expected(run), whole_bytes(run)
    wrong = [
        f"{key}: {value:,} bytes and {getattr(wanted, key):,} by the formula"
        for key, value in asdict(own).items()
        if abs(value - getattr(wanted, key)) > SHARE * getattr(wanted, key)
    ]
    all_wrong = run.runtime.gather_json(wrong)
    if any(all_wrong):
        rank = next(i for i, found in enumerate(all_wrong) if found)
        raise ProofError(
            f"runtime.shard={run.runtime.shard}: process {rank} of {run.runtime.world} holds {'; '.join(all_wrong[rank])}; "
            "the training is not divided as the recipe says"
        )
    return {
        "shard": run.runtime.shard,
        "processes": run.runtime.gather_json(asdict(own)),
        "whole": asdict(undivided),
        "saved_bytes": undivided.total - own.total,
    }


def held_bytes(run: RunState) -> Bytes:
    """Count the bytes that live on this process, each storage once."""
    parameters = list(run.model.parameters())
    grads = [p.grad for p in parameters if p.grad is not None]
    return Bytes(storage_bytes(parameters), storage_bytes(grads), storage_bytes(states_of(run)))


def states_of(run: RunState) -> list[Tensor]:
    """Return the tensors of the optimizer's state on this process."""
    if run.optimizer is None:
        return []
    return [value for state in run.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages behind some tensors, each once."""
    storages = {(s := local(t).untyped_storage()).data_ptr(): s.nbytes() for t in tensors}
    return sum(size for place, size in storages.items() if place)


def expected(run: RunState) -> Bytes:
    """Return the bytes that the stage of the run gives to this process."""
    runtime = run.runtime
    parameters = list(run.model.parameters())
    if not runtime.in_step:
        stepping: Any = run.optimizer
        own = {id(p) for group in stepping.optim.param_groups for p in group["params"]}
        state = sum(run.optim.state_bytes(tuple(p.shape)) for p in parameters if id(p) in own and p.grad is not None)
        undivided = whole_bytes(run)
        return Bytes(undivided.parameters, undivided.gradients, state)
    sizes = {id(p): part_shape(p, runtime.shards) for p in parameters}
    held = {id(p): math.prod(sizes[id(p)]) * p.element_size() for p in parameters}
    trained = [p for p in parameters if p.grad is not None]
    return Bytes(
        sum(held.values()),
        sum(held[id(p)] for p in trained),
        sum(run.optim.state_bytes(own_shape(p)) for p in trained),
    )


def part_shape(tensor: Tensor, parts: int) -> tuple[int, ...]:
    """Return the shape of the memory for one part of a tensor whose rows are divided, padding included."""
    shape = tuple(tensor.shape)
    if not is_sharded(tensor):
        return shape
    return (math.ceil(shape[0] / parts), *shape[1:])


def own_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of this process's part of a tensor, without padding."""
    return tuple(local(tensor).shape)


def whole_bytes(run: RunState) -> Bytes:
    """Return the bytes of the same training where nothing is divided."""
    parameters = list(run.model.parameters())
    trained = [p for p in parameters if p.grad is not None]
    return Bytes(
        sum(p.numel() * p.element_size() for p in parameters),
        sum(p.numel() * p.element_size() for p in trained),
        sum(run.optim.state_bytes(tuple(p.shape)) for p in trained),
    )
