"""Attention for packed rows and attention hooks, through Transformers' AttentionInterface.

Letters: R rows, Hq query heads, G key/value heads, T columns, E head size, P prefix columns.

`install_attention(model, backend)` switches a model to an attention function of ours around a stock backend:

- packed rows: no T x T mask exists (see `packed_attention`). A segment sees itself causally, its parent (a shared prompt) and
  every prefix fully, and nothing else.
- attention hooks: a hook wraps the call and may prepend key/value columns (`Prefix`); they have no position.
- everything else is the stock backend, bit for bit.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmrecipe.core.forward_context import Layout, current
from llmrecipe.models.attention_calls import (
    OURS,
    Prefix,
    attend_one,
    in_reach,
    is_causal_in,
    repeat_heads,
    stock_backend,
    with_prefix,
)
from llmrecipe.models.hooks.between_graphs import call_apart
from llmrecipe.models.hooks.hook import ROUTED, Hook, hooks_of, note_called
from llmrecipe.models.packed_attention import attend_packed
from llmrecipe.models.pretrained import pretrained


@dataclass(frozen=True)
class PickedTokens:
    """The tokens of a batch that attention is computed for; the others come out as zeros."""

    index: Tensor
    """(R, K) their columns, in order."""
    valid: Tensor
    """(R, K) False where a row has fewer than K of them."""
    counts: tuple[int, ...] = ()
    """Number of picked tokens of each segment of a packed row."""
    keys: bool = False
    """Whether they attend to each other only, instead of to all preceding tokens."""


Attend = Callable[..., Tensor]
"""attend(q, k, v, *prefixes, picked=None) -> (R, Hq, T, Ev)"""


def install_attention(model: nn.Module, backend: str, route: str = "auto") -> str:
    """Route a model's attention through this module; return the name it has in Transformers.

    Args:
        route: how packed rows are computed (see `packed_attention`).
    """
    if backend == "sdpa" and not getattr(model, "_supports_sdpa", True):
        backend = "eager"
    name = f"{OURS}{backend}" + ("" if route == "auto" else f"__{route}")
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, _attention(backend, route))
        stock_mask = ALL_MASK_ATTENTION_FUNCTIONS[backend]

        def mask(*args: object, **kwargs: object) -> Tensor | None:
            # Packed rows have their layout in the context; a T x T mask would only undo the saving.
            return None if current().layout is not None else stock_mask(*args, **_unread(kwargs))

        ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    _find_no_documents()
    ROUTED.add(name)
    pretrained(model).set_attn_implementation(name)
    return name


def one_by_one(model: nn.Module) -> str | None:
    """Compute a model's packed rows document by document from here on; return the name its attention had.

    Nothing changes, and None is returned, where its route was named or packed rows are not routed at all.
    """
    inner = pretrained(model)
    name = str(inner.config._attn_implementation)
    if not name.startswith(OURS) or "__" in name:
        return None
    install_attention(model, stock_backend(name), "loop")
    return name


def _unread(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a stock mask builder so that it reads no values of a device to see whether it may do without.

    What it would find is known for the rows of a batch (`Context.padded`); any other mask is built, whatever is in it.
    """
    given, context = kwargs.get("attention_mask"), current()
    if not isinstance(given, Tensor) or given.device.type == "cpu":
        return kwargs
    own = context.attention_mask is not None and context.attention_mask.shape == given.shape
    if own and context.padded is False:
        return {**kwargs, "attention_mask": None}
    skips = ("allow_is_causal_skip", "allow_is_bidirectional_skip")
    return {**kwargs, **{name: False for name in skips if name in kwargs}}


def _find_no_documents() -> None:
    """Keep Transformers from looking for packed documents in the position ids of rows whose layout is known.

    It would build masks that are not used, and wait for the device.
    """
    stock = masking_utils.find_packed_sequence_indices
    if getattr(stock, "knows_layouts", False):
        return

    @functools.wraps(stock)
    def find(position_ids: Tensor) -> Tensor | None:
        return None if current().layout is not None else stock(position_ids)

    find.knows_layouts = True  # type: ignore[attr-defined]
    masking_utils.find_packed_sequence_indices = find


def _attention(backend: str, route: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: object
    ) -> tuple[Tensor, Tensor | None]:
        layout = current().layout
        hooks = hooks_of(module, "attention", active=True)
        note_called(hooks)
        if layout is None and not hooks:
            return _stock(backend, module)(module, query, key, value, attention_mask, **kwargs)
        # Documents of packed rows are other numbers in every batch.
        return call_apart(computed, module, hooks, query, key, value, attention_mask, kwargs)

    def computed(
        module: nn.Module,
        hooks: list[Hook],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        layout = current().layout

        def attended(
            q: Tensor, k: Tensor, v: Tensor, joined: tuple[Prefix, ...], kwargs: dict[str, Any], picked: PickedTokens | None
        ) -> Tensor:
            if picked is not None and layout is not None:
                return _picked_packed(module, layout, picked, q, k, v, joined, kwargs)
            if picked is not None:
                return _picked_padded(backend, module, picked, q, k, v, attention_mask, joined, kwargs)
            if layout is not None:
                return attend_packed(route, module, layout, q, k, v, joined, kwargs)
            return _padded(backend, module, q, k, v, attention_mask, joined, kwargs)

        def base(q: Tensor, k: Tensor, v: Tensor, *prefixes: Prefix, picked: PickedTokens | None = None) -> Tensor:
            joined = [p for p in prefixes if p.gate is None]
            wide = _Widened(q, joined, kwargs)
            out = wide.fold(attended(*wide.tensors(k, v), wide.prefixes, wide.kwargs, picked), picked)
            queries = q if picked is None else _take(q, picked.index, 2)
            for prefix in prefixes:
                if prefix.gate is not None:
                    out = out + prefix.gate.to(out.dtype) * _apart(layout, picked, queries, prefix, kwargs)
            return out

        call: Attend = base
        for hook in hooks:
            call = _wrap(hook, call)
        return call(query, key, value).transpose(1, 2).contiguous(), None

    return attention


def _wrap(hook: Hook, call: Attend) -> Attend:
    def wrapped(q: Tensor, k: Tensor, v: Tensor, *outer: Prefix, picked: PickedTokens | None = None) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor, *own: Prefix, **more: object) -> Tensor:
            return call(q, k, v, *outer, *own, **{"picked": picked, **more})

        return hook.attention(attend, q, k, v)

    return wrapped


def _stock(backend: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if backend == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[backend]


class _Widened:
    """Prefixes scaled per query, expressed as plain ones: wider heads with q' k' = q k and q' p' = g q p, and wider values.

    q' = [q, g q]    k' = [k, 0]    p_k' = [0, p_k]    v' = [v, 0]    p_v' = [0, p_v]    out = out'_1 + g out'_2
    """

    def __init__(self, q: Tensor, prefixes: list[Prefix], kwargs: dict[str, Any]):
        self.scales = [p.scale.to(q.dtype) for p in prefixes if p.scale is not None]
        self.q, self.kwargs, self.count = q, kwargs, len(self.scales)
        if self.count:
            self.q = torch.cat([q, *(g * q for g in self.scales)], -1)
            scaling = kwargs.get("scaling")
            self.kwargs = {**kwargs, "scaling": q.shape[-1] ** -0.5 if scaling is None else scaling}
        places = iter(range(1, self.count + 1))
        self.prefixes = tuple(self._place(p, 0 if p.scale is None else next(places)) for p in prefixes)

    def _place(self, prefix: Prefix, place: int) -> Prefix:
        def at(x: Tensor) -> Tensor:
            return F.pad(x, (place * x.shape[-1], (self.count - place) * x.shape[-1]))

        return prefix if not self.count else replace(prefix, k=at(prefix.k), v=at(prefix.v), scale=None)

    def tensors(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q', k', v'."""
        if not self.count:
            return self.q, k, v
        return self.q, F.pad(k, (0, self.count * k.shape[-1])), F.pad(v, (0, self.count * v.shape[-1]))

    def fold(self, out: Tensor, picked: PickedTokens | None) -> Tensor:
        """Combine the parts of the widened output, (R, Hq, T, (1 + n) Ev) -> (R, Hq, T, Ev)."""
        if not self.count:
            return out
        first, *rest = out.chunk(self.count + 1, -1)
        for g, part in zip(self.scales, rest, strict=True):
            wide = g.expand(out.shape[0], -1, -1, -1)
            first = first + (wide if picked is None else _take(wide, picked.index, 2)) * part
        return first


def _apart(layout: Layout | None, picked: PickedTokens | None, q: Tensor, prefix: Prefix, kwargs: dict[str, Any]) -> Tensor:
    """Return softmax(q k^T) v over the columns of one prefix alone, without sinks, (R, Hq, T, Ev)."""
    kwargs = {**kwargs, "s_aux": None}
    k, v = (repeat_heads(x, q.shape[1]).to(q.dtype) for x in (prefix.k, prefix.v))
    bias = None if prefix.bias is None else prefix.bias.to(q.dtype)
    if layout is not None and k.shape[0] > 1:
        parts = q.split([s.length for s in layout.segments] if picked is None else list(picked.counts), 2)
        rows = range(len(parts))
        return torch.cat([attend_one(parts[i], k[i : i + 1], v[i : i + 1], None, bias, False, kwargs) for i in rows], 2)
    k, v = k.expand(q.shape[0], -1, -1, -1), v.expand(q.shape[0], -1, -1, -1)
    return attend_one(q, k, v, None, bias, False, kwargs)


def _padded(
    backend: str,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    prefixes: tuple[Prefix, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Call the stock backend with keys and values extended by the prefixes' columns; returns (R, Hq, T, Ev)."""
    rows, columns, bias = k.shape[0], k.shape[2], None
    for prefix in reversed(prefixes):
        k, v, bias = with_prefix(prefix, 0, k.shape[1], k, v, bias)
    extra = k.shape[2] - columns
    if extra:
        mask = _widen(module, q, columns, extra, mask, bias, kwargs)
        position_bias = kwargs.get("position_bias")
        if position_bias is not None:
            kwargs = {**kwargs, "position_bias": F.pad(position_bias, (extra, 0))}
        kwargs = {**kwargs, "is_causal": False}
    out, _ = _stock(backend, module)(module, q, k, v, mask, **kwargs)
    return out.reshape(rows, q.shape[2], q.shape[1], -1).transpose(1, 2)


def _widen(
    module: nn.Module, q: Tensor, columns: int, extra: int, mask: Tensor | None, bias: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    """Return an additive mask (R | 1, 1, Tq, extra + columns) whose first `extra` columns are open."""
    low = torch.finfo(q.dtype).min
    if mask is None:
        rows = torch.zeros(q.shape[2], columns, dtype=q.dtype, device=q.device)
        if is_causal_in(module, kwargs) and q.shape[2] > 1:
            allowed = torch.ones(q.shape[2], columns, dtype=torch.bool, device=q.device).tril(columns - q.shape[2])
            rows = rows.masked_fill(~allowed, low)
        mask = rows[None, None]
    elif mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, low)
    wide = F.pad(mask[..., :columns], (extra, 0))
    return wide if bias is None else wide + bias


# --- some of the tokens ----------------------------------------------------------------------------------------------


def _picked_padded(
    backend: str,
    module: nn.Module,
    picked: PickedTokens,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    prefixes: tuple[Prefix, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Call the stock backend for the picked queries, over all keys or over the picked ones."""
    columns, bias = k.shape[2], None
    if picked.keys:
        k, v = _take(k, picked.index, 2), _take(v, picked.index, 2)
    own = k.shape[2]
    for prefix in reversed(prefixes):
        k, v, bias = with_prefix(prefix, 0, k.shape[1], k, v, bias)
    extra = k.shape[2] - own
    if mask is not None or extra or is_causal_in(module, kwargs):
        mask = _pick(_widen(module, q, columns, extra, mask, bias, kwargs), picked, extra)
    if picked.keys:
        low = q.new_zeros(picked.valid.shape).masked_fill(~picked.valid, torch.finfo(q.dtype).min)
        low = F.pad(low, (extra, 0))[:, None, None, :]
        mask = low.expand(-1, -1, picked.index.shape[1], -1) if mask is None else mask + low
    if kwargs.get("position_bias") is not None:
        kwargs = {**kwargs, "position_bias": _pick(F.pad(kwargs["position_bias"], (extra, 0)), picked, extra)}
    queries = _take(q, picked.index, 2)
    out, _ = _stock(backend, module)(module, queries, k, v, mask, **{**kwargs, "is_causal": False})
    out = out.reshape(*queries.transpose(1, 2).shape[:3], -1).transpose(1, 2)
    place = picked.index[:, None, :, None].expand(-1, out.shape[1], -1, out.shape[3])
    return out.new_zeros(*q.shape[:3], out.shape[3]).scatter(2, place, out)


def _take(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """Gather the columns (R, K) of a four-dimensional x along an axis."""
    shape = [1] * x.dim()
    shape[0], shape[axis] = index.shape
    wide = [*x.shape]
    wide[0], wide[axis] = index.shape
    return x.expand(index.shape[0], -1, -1, -1).gather(axis, index.view(shape).expand(wide))


def _pick(scores: Tensor, picked: PickedTokens, extra: int) -> Tensor:
    """Gather the picked rows, and with `picked.keys` the picked columns after `extra`, of scores (R, H, T, extra + T)."""
    if scores.shape[2] > 1:
        scores = _take(scores, picked.index, 2)
    if picked.keys:
        scores = torch.cat(
            (scores[..., :extra].expand(picked.index.shape[0], -1, -1, -1), _take(scores[..., extra:], picked.index, 3)), 3
        )
    return scores


def _picked_packed(
    module: nn.Module,
    layout: Layout,
    picked: PickedTokens,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefixes: tuple[Prefix, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Call attention once per segment that has picked tokens, (R, Hq, T, E) -> (R, Hq, T, Ev)."""
    heads, causal = q.shape[1], is_causal_in(module, kwargs)
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    index = picked.index[0]
    outs: list[Tensor] = []
    for place, (segment, local) in enumerate(zip(layout.segments, index.split(list(picked.counts)), strict=True)):
        if not len(local):
            continue
        own = local if picked.keys else torch.arange(segment.start, segment.start + segment.length, device=q.device)
        parent = layout.segments[segment.parent] if segment.parent is not None else None
        free = parent.length if parent is not None else 0
        seen = own if parent is None else torch.cat((torch.arange(parent.start, parent.start + free, device=q.device), own))
        key, value, bias = k[:, :, seen], v[:, :, seen], None
        for prefix in reversed(prefixes):
            key, value, bias = with_prefix(prefix, place, heads, key, value, bias)
        mask, window = None, kwargs.get("sliding_window")
        if causal or window is not None:
            at = torch.cat((torch.arange(free, device=q.device), own - segment.start + free))
            allowed = in_reach((local - segment.start + free)[:, None], at[None, :], causal, window)
            mask = F.pad(allowed, (key.shape[2] - len(seen), 0), value=True)
        outs.append(attend_one(q[:, :, local], key, value, mask, bias, False, kwargs))
    out = torch.cat(outs, 2)
    return out.new_zeros(*q.shape[:3], out.shape[3]).index_copy(2, index, out)
