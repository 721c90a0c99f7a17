"""The context of one forward pass: what every hook may read in addition to its tensors.

A `Context` is immutable and valid for one forward pass. When activation checkpointing recomputes a block during the backward
pass, the context of the original forward is restored for the recomputation, so a hook sees the same role and layout as it
did the first time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Segment:
    """A run of tokens inside one packed row.

    A segment attends causally to itself and fully to its parent (a shared prompt), never to its neighbours.
    """

    row: int
    """Row of the packed batch, 0 <= row < R."""
    start: int
    """First column."""
    length: int
    parent: int | None = None
    """Index of the segment whose tokens directly precede this one's, or None."""
    prompt: int = 0
    """Number of its tokens that belong to the prompt (positions a prompt-only method may edit)."""


@dataclass(frozen=True)
class Layout:
    """Which tokens of a packed batch (R, T) belong together."""

    segments: tuple[Segment, ...]
    rows: int
    columns: int
    cache: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)
    """Cache of masks and indices that are derived once per batch."""


@dataclass(frozen=True)
class Context:
    """What a hook may read during one forward pass."""

    role: str = "policy"
    """policy, reference, value, reward, ...: a hook that does not serve the role is disabled."""
    layout: Layout | None = None
    """Layout of packed rows; None for ordinary padded rows."""
    attention_mask: torch.Tensor | None = None
    """(R, T) ones on real tokens, for padded rows."""
    positions: torch.Tensor | None = None
    """(R, T) position of each token in its document."""
    task_ids: torch.Tensor | None = None
    """(R, T) or (R, 1) task of each token, for mixed-task batches."""
    prompt_lengths: torch.Tensor | None = None
    """(R,) real prompt tokens of each padded row."""
    padded: bool | None = None
    """Whether `attention_mask` masks anything, where it is the mask of every attention of the pass; None where not known."""
    read: torch.Tensor | None = None
    """(M,) sorted flat indices into R * T of the final states that are used; None when unknown, or when all are."""
    off: frozenset[str] = frozenset()
    """Names of wrappers whose hooks are disabled."""
    examples: tuple[torch.Tensor, torch.Tensor] | None = None
    """Token ids (K, T') and mask (K, T') of the texts that K adapters are made from; `task_ids` says which adapts a token."""
    computed: MutableMapping[str, Any] | None = field(default=None, compare=False, repr=False)
    """What one forward pass computes once for all its parts (encoder and decoder), by wrapper name; None keeps nothing."""
    shared: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What a `wrap_module` hook computed once for the hooks inside its host, by wrapper name."""
    here: tuple[tuple[torch.Tensor, torch.Tensor], ...] = field(default=(), compare=False, repr=False)
    """Pairs of a tensor on a device and the one of the host that it was copied from."""

    def on_host(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the values of a tensor where the host can read them without waiting for a device; None where it cannot."""
        if tensor.device.type == "cpu":
            return tensor
        return next((own for there, own in self.here if there is tensor), None)


class _Running(threading.local):
    """The context of a thread's forward pass: an attribute, which `torch.compile` can trace, as it cannot a `ContextVar`."""

    def __init__(self) -> None:
        # Of each thread, never of the class: graphs would take that one for the value in every pass.
        self.context = Context()


_running = _Running()


def current() -> Context:
    """Return the context of the forward pass that is running."""
    return _running.context


@contextlib.contextmanager
def activate(context: Context) -> Iterator[Context]:
    """Run a forward pass under a context."""
    before, _running.context = _running.context, context
    try:
        yield context
    finally:
        _running.context = before


def checkpoint_contexts() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
    """Return `context_fn` for non-reentrant checkpointing: recomputation runs under the context of the original forward."""
    return contextlib.nullcontext(), activate(current())
