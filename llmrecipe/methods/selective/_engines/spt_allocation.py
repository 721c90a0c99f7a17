"""SPT's allocation: from sensitivities and a budget to structured modules, whole vectors and single entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.methods._engines import low_rank
from llmrecipe.methods.selective._engines.top_k import counts_at, top_k
from llmrecipe.models.hooks.hook import SERIAL, Hook, device_of
from llmrecipe.models.hooks.host import add_hook

if TYPE_CHECKING:
    from llmrecipe.models.site import Site


@dataclass(frozen=True)
class Tunable:
    """A tensor the budget may be spent on."""

    name: str
    size: int
    """Entries."""
    whole: int
    """What its structured form costs: a module added to a matrix, or all of a vector."""
    threshold: float
    """Sensitive entries from which the structured form is taken."""
    path: str = ""
    """Module path of a matrix; empty for a vector."""


@dataclass(frozen=True)
class Allocation:
    """How a budget is spent."""

    tau: int
    """Sensitive entries taken."""
    total: int
    """Numbers that train."""
    structured: list[str]
    """Module paths of matrices with a structured module."""
    entries: dict[str, Tensor]
    """name -> flat indices that train; all of them for an entire vector."""


def is_whole(tunable: Tunable, count: int) -> bool:
    """Return whether a number of sensitive entries gives the structured form."""
    return count > 0 and count >= tunable.threshold


def cost(tunables: Sequence[Tunable], counts: Sequence[int], structured_only: bool) -> int:
    """Return the numbers that train when each tensor has a number of sensitive entries; never falls as counts grow."""
    single = 0 if structured_only else 1
    return sum(t.whole if is_whole(t, c) else single * c for t, c in zip(tunables, counts, strict=True))


def allocate(tunables: Sequence[Tunable], keys: Sequence[Tensor], budget: int, structured_only: bool = False) -> Allocation:
    """Find the largest tau whose cost is within the budget.

    Args:
        keys: bit patterns of each tensor's sensitivities (see `top_k.pattern`).

    Raises:
        ModelError: the budget buys nothing.
    """
    low, high = 0, sum(t.size for t in tunables)
    while low < high:
        middle = (low + high + 1) // 2
        if cost(tunables, counts_at(keys, middle), structured_only) <= budget:
            low = middle
        else:
            high = middle - 1
    counts = counts_at(keys, low)
    total = cost(tunables, counts, structured_only)
    if total == 0:
        raise ModelError(f"budget: {budget} numbers buy no structured module; raise it or set structured_only to false")
    best = top_k([(t.name, key.view(torch.float32), None) for t, key in zip(tunables, keys, strict=True)], low)
    structured, entries = [], {}
    for t, count in zip(tunables, counts, strict=True):
        if not is_whole(t, count):
            if count and not structured_only:
                entries[t.name] = best[t.name]
        elif t.path:
            structured.append(t.path)
        else:
            entries[t.name] = torch.arange(t.size)
    return Allocation(low, total, structured, entries)


class SequentialAdapter(Hook):
    """A bottleneck on a layer's output: y + W_u GELU(W_d y + b_d) + b_u, with W_u = 0 and b_u = 0 at the start."""

    order = SERIAL

    def __init__(self, width: int, r: int, dropout: float):
        super().__init__()
        self.down = nn.Linear(width, r)
        self.up = nn.Linear(r, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.dropout = dropout

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + A(y), (..., out)."""
        kind = y.dtype
        inner = F.gelu(F.linear(y, self.down.weight.to(kind), self.down.bias.to(kind)))
        inner = F.dropout(inner, self.dropout, self.training)
        return y + F.linear(inner, self.up.weight.to(kind), self.up.bias.to(kind))


def add_structured(site: Site, owner: str, kind: str, r: int, dropout: float) -> None:
    """Add the structured module of a matrix at its site."""
    if kind == "lora":
        hook = low_rank.low_rank_hook(site, r, 1.0, dropout)
        low_rank.init_low_rank(hook)
    else:
        with torch.device(device_of(site.module)):
            hook = SequentialAdapter(site.width_out, r, dropout)
    add_hook(site.module, owner, hook, owner)
