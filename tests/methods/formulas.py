"""How many numbers each method trains on a decoder, in closed form: the sums of the papers, apart from the code that counts.

d width, f feed-forward width, L layers, k width of keys and values together over their heads, q that of queries, r rank or
bottleneck, P virtual tokens, c hidden width of a prefix MLP, N numbers of the base, G its tensors, B those of its blocks, n
numbers of the norms of a block.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

BLOCKS = re.compile(r"\.layers?\.")


@dataclass(frozen=True)
class Shape:
    """What the formulas speak of, read from the config and from the names of the tensors."""

    d: int
    f: int
    L: int
    q: int
    k: int
    N: int
    G: int
    B: int
    n: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the seven matrices of a block."""
        d, f = self.d, self.f
        return [(d, self.q), (d, self.k), (d, self.k), (self.q, d), (d, f), (d, f), (f, d)]


def shape(model: nn.Module) -> Shape:
    """Of an untouched decoder like Llama, or of an encoder like BERT."""
    c = model.config
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    named = dict(model.named_parameters())
    return Shape(
        d=c.hidden_size,
        f=c.intermediate_size,
        L=c.num_hidden_layers,
        q=c.num_attention_heads * head,
        k=getattr(c, "num_key_value_heads", c.num_attention_heads) * head,
        N=sum(p.numel() for p in named.values()),
        G=len(named),
        B=sum(p.numel() for n, p in named.items() if BLOCKS.search(n)),
        n=sum(p.numel() for n, p in named.items() if BLOCKS.search(n) and "norm" in n.lower()) // c.num_hidden_layers,
    )


def pairs(w: Any, s: Shape) -> int:
    """r (in + out) of a pair at queries and values."""
    return s.L * w.r * (s.d + s.q + s.d + s.k)


def columns(w: Any, s: Shape) -> int:
    """Keys and values of P tokens in every layer."""
    return 2 * s.L * w.num_virtual_tokens * s.k


def prefix_mlp(w: Any, s: Shape) -> int:
    """A small table of width k and two layers."""
    return w.num_virtual_tokens * s.k + w.hidden * (s.k + 1) + 2 * s.L * s.k * (w.hidden + 1)


Count = Callable[[Any, Shape], int]

FORMULAS: dict[str, tuple[str, Count]] = {
    "adapter": ("2 L (2 d r + r + d)", lambda w, s: 2 * s.L * (2 * s.d * w.r + w.r + s.d)),
    "parallel_adapter": ("L (2 d r + r + d), r = d / 2", lambda w, s: s.L * (2 * s.d * (s.d // 2) + s.d // 2 + s.d)),
    "coda": ("L (2 d r + r + 2 d + n)", lambda w, s: s.L * (2 * s.d * w.r + w.r + 2 * s.d + s.n)),
    "prefix_tuning": ("P k + c (k + 1) + 2 L k (c + 1)", prefix_mlp),
    "p_tuning_v2": ("2 L P k", columns),
    "prompt_tuning": ("P d", lambda w, s: w.num_virtual_tokens * s.d),
    "apt": ("2 L P k + L d P + L", lambda w, s: columns(w, s) + s.L * s.d * w.num_virtual_tokens + s.L),
    "ia3": ("L (2 k + f)", lambda w, s: s.L * (2 * s.k + s.f)),
    "bitfit": ("L (q + 2 k + d + 2 f + d)", lambda w, s: s.L * sum(out for _, out in s.linears)),
    "fishmask": ("floor(density N)", lambda w, s: int(w.density * s.N)),
    "child_tuning": ("floor(p B) + N - B", lambda w, s: int(w.p * s.B) + s.N - s.B),
    "diff_pruning": ("2 N + G while gates train", lambda w, s: 2 * s.N + s.G),
    "loreft": ("L (2 r d + r)", lambda w, s: s.L * (2 * w.r * s.d + w.r)),
    "direft": ("L (2 r d + r)", lambda w, s: s.L * (2 * w.r * s.d + w.r)),
    "lora_fa": ("sum over linears of r out", lambda w, s: s.L * w.r * sum(o for _, o in s.linears)),
    "lora": ("L r (d + q + d + k)", pairs),
    "dylora": ("L r (d + q + d + k)", pairs),
    "dora": ("L r (d + q + d + k) + L (q + k)", lambda w, s: pairs(w, s) + s.L * (s.q + s.k)),
    "mam": ("prefix_tuning + L (2 d r + r + d)", lambda w, s: prefix_mlp(w, s) + s.L * (2 * s.d * w.r + w.r + s.d)),
    "unipelt": (
        "lora + prefix_tuning + L (2 d b + b + d) + 4 L (d + 1)",
        lambda w, s: pairs(w, s) + prefix_mlp(w, s) + s.L * ((2 * s.d + 1) * (s.d // w.reduction) + s.d) + 4 * s.L * (s.d + 1),
    ),
    "llm_adapters": ("2 L d r", lambda w, s: 2 * s.L * s.d * w.r),
    "adalora": ("sum over linears of r (in + out + 1)", lambda w, s: s.L * sum(w.init_r * (i + o + 1) for i, o in s.linears)),
}
"""Kinds whose number follows from shapes alone; group_mask and spt fill a budget."""
