"""One attention call over a packed row.

Letters: Hq query heads, G key/value heads, T tokens of the packed row, E and Ev key and value head sizes, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmrecipe.core.forward_context import Layout
from llmrecipe.models.attention_calls import Prefix, repeat_heads


@dataclass(frozen=True)
class Call:
    """One attention call over a packed row."""

    layout: Layout
    q: Tensor
    """(1, Hq, T, E)"""
    k: Tensor
    """(1, G, T, E)"""
    v: Tensor
    """(1, G, T, Ev)"""
    prefixes: tuple[Prefix, ...]
    causal: bool
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    """(Hq,)"""
    scale: float | None
    dropout: float

    @property
    def heads(self) -> int:
        """Return the number of key/value heads that keys and prefixes can be given."""
        return max(self.k.shape[1], *(p.k.shape[1] for p in self.prefixes), 1)

    def columns(self, name: str) -> Tensor:
        """Return the keys (`k`) or values (`v`) of all prefixes, then of all tokens, (C, G, E)."""
        own = getattr(self, name)[0].transpose(0, 1)
        parts = [getattr(p, name).to(own.dtype).transpose(1, 2).flatten(0, 1) for p in self.prefixes] + [own]
        heads = self.heads
        return torch.cat([repeat_heads(x, heads) for x in parts]) if self.prefixes else own
