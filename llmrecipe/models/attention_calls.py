"""One attention call: key/value prefixes, the mask of a segment, and softmax attention with a soft cap and sinks.

Letters: R rows, Hq query heads, G key/value heads, T columns, E head size, P prefix columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipe.core.forward_context import Layout

OURS = "llmrecipe_"
"""Begins the names that attention functions of `models.attention` have in Transformers."""


def stock_backend(name: str) -> str:
    """Return the stock backend below an attention function, by its name in Transformers."""
    return name.removeprefix(OURS).partition("__")[0] if name.startswith(OURS) else name


@dataclass(frozen=True)
class Prefix:
    """Key/value columns every query of a row sees."""

    k: Tensor
    """(1 | R | S, G, P, E): one for all, one a row, or one a segment of a packed row."""
    v: Tensor
    """(1 | R | S, G, P, Ev)"""
    bias: Tensor | None = None
    """(P,) added to the logits of these columns."""
    gate: Tensor | None = None
    """A number; with it the columns have a softmax of their own and join as out + gate * softmax(q k^T) v, so a gate of zero
    leaves attention as it was."""
    scale: Tensor | None = None
    """(R | 1, Hq | 1, T, 1) multiplies the keys and values of these columns as each query sees them."""


def is_causal_in(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Return whether a module attends causally."""
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat the heads of keys or values (R, G, T, E) for as many query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def with_prefix(
    prefix: Prefix, row: int, heads: int, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Put a prefix's columns before keys and values; the bias (columns,) grows where either has one."""
    pick = slice(row, row + 1) if prefix.k.shape[0] > 1 and key.shape[0] == 1 else slice(None)
    pk = repeat_heads(prefix.k[pick], heads).to(key.dtype).expand(key.shape[0], -1, -1, -1)
    pv = repeat_heads(prefix.v[pick], heads).to(value.dtype).expand(key.shape[0], -1, -1, -1)
    if prefix.bias is not None or bias is not None:
        rest = key.new_zeros(key.shape[2]) if bias is None else bias
        own = key.new_zeros(pk.shape[2]) if prefix.bias is None else prefix.bias.to(key.dtype)
        bias = torch.cat((own, rest))
    return torch.cat((pk, key), 2), torch.cat((pv, value), 2), bias


def segment_mask(
    layout: Layout, length: int, parent: int, prefix: int, causal: bool, window: int | None, device: torch.device
) -> Tensor | None:
    """Return a boolean mask (length, prefix + parent + length), or None for plain causal (or full) attention."""
    narrow = window is not None and parent + length > window
    if not narrow and (not causal or (not parent and not prefix)):
        return None
    key = ("mask", length, parent, prefix, causal, window if narrow else None, device)
    if key not in layout.cache:
        q_position = torch.arange(parent, parent + length, device=device)[:, None]
        k_position = torch.arange(parent + length, device=device)[None, :]
        allowed = in_reach(q_position, k_position, causal, window if narrow else None)
        layout.cache[key] = F.pad(allowed, (prefix, 0), value=True)
    return layout.cache[key]


def in_reach(q_position: Tensor, k_position: Tensor, causal: bool, window: int | None) -> Tensor:
    """Return whether a query sees a key of its own document: q - w < k <= q where causal, |q - k| < w otherwise."""
    ahead = q_position - k_position
    least = 0 if causal else 1 - window if window is not None else -(2**31)
    return ahead >= least if window is None else (ahead >= least) & (ahead < window)


def attend_one(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, causal: bool, kwargs: dict[str, Any]
) -> Tensor:
    """Compute softmax(q k^T scale + bias) v, (R, Hq, T, E) -> (R, Hq, T, Ev), with the options a family passes.

    `softcap` c bounds the logits as c tanh(x / c); sinks `s_aux` (Hq,) add a logit to each head's softmax that has no value.
    """
    scale, softcap, sinks = kwargs.get("scaling"), kwargs.get("softcap"), kwargs.get("s_aux")
    dropout = kwargs.get("dropout", 0.0)
    if bias is not None:
        rows = (
            q.new_zeros(q.shape[2], k.shape[2]) if mask is None else q.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
        )
        mask = rows + bias
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale)
    weights = torch.matmul(q, k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        weights = torch.tanh(weights / softcap) * softcap
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        weights = weights.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else weights + mask
    if sinks is not None:
        weights = torch.cat((weights, sinks.to(weights.dtype).view(1, -1, 1, 1).expand(*weights.shape[:3], 1)), -1)
    shares = weights.softmax(-1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]]
    return torch.matmul(F.dropout(shares, dropout), v)
