"""Attention of packed rows: a loop over documents, or all of them in one call.

Letters: Hq query heads, G key/value heads, T tokens of the packed row, E head size, P prefix columns, S segments.

A segment sees itself (causally, or wholly in an encoder, within its sliding window), its parent (a shared prompt) and every
prefix, and nothing else. Routes:

    loop    one call per segment; defines what the others compute
    varlen  `torch.nn.attention.varlen`, FlashAttention-2 inside torch: keys of the segments one after another
    flash   the same through the flash-attn package, which also knows soft caps and dropout, or through FlashAttention-3
            (`flash_attn_interface`) where it is installed, the GPU is a Hopper and there is no dropout
    flex    FlexAttention (`packed_flex`): sinks, biased prefixes, prefixes with a sliding window

`auto` takes, for each call, the first route of the device profile that can compute it: on a CPU the loop; on a GPU varlen, then
flash, then flex, then the loop.

Source: FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmrecipe.core.device_profile import profile_of
from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import Layout
from llmrecipe.core.lazy import is_installed, load_module
from llmrecipe.data.transfer import to_device
from llmrecipe.models.attention_calls import Prefix, attend_one, is_causal_in, repeat_heads, segment_mask, with_prefix
from llmrecipe.models.packed_call import Call
from llmrecipe.models.packed_flex import attend_flex, flex_lacking, flex_refusal

if TYPE_CHECKING:
    from llmrecipe.core.device_profile import Profile

ONE_CALL = ("varlen", "flash", "flex")
"""Routes that compute all documents in one call."""
FLASH_CAPABILITY = (8, 0)
"""Least compute capability of FlashAttention-2."""
FLASH_3_CAPABILITY = 9
"""Major compute capability that FlashAttention-3 is made for."""
FLASH_HEAD_SIZE = 256
"""Largest head size of FlashAttention; head sizes are multiples of 8."""


def attend_packed(
    route: str,
    module: nn.Module,
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefixes: tuple[Prefix, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Compute attention of a packed row on a route, (1, Hq, T, E) -> (1, Hq, T, Ev).

    Raises:
        ModelError: the route was named and cannot compute this call.
    """
    tried = profile_of(q.device).decided.packed_attention if route == "auto" else (route,)
    if tried[0] == "loop":
        return per_document(module, layout, q, k, v, prefixes, kwargs)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    call = Call(
        layout, q, k, v, prefixes, is_causal_in(module, kwargs), kwargs.get("sliding_window"), kwargs.get("softcap"),
        kwargs.get("s_aux"), kwargs.get("scaling"), kwargs.get("dropout", 0.0),
    )  # fmt: skip
    if route == "auto":
        found = next((name for name in tried if name == "loop" or route_refusal(name, call) is None), "loop")
        return per_document(module, layout, q, k, v, prefixes, kwargs) if found == "loop" else COMPUTE[found](call)
    if why := route_refusal(route, call):
        raise ModelError(f"model.packed_attention: {route} {why}; use auto or loop")
    return COMPUTE[route](call)


def check_route(route: str, device: str) -> None:
    """Refuse a named route that this machine cannot take, before any weight is read.

    Raises:
        ModelError: it says what is missing.
    """
    if route in ONE_CALL and (why := lacking(route, torch.device(device))):
        raise ModelError(f"model.packed_attention: {route} {why}; use auto or loop")


def routes_of(profile: Profile, device: torch.device) -> tuple[str, ...]:
    """Return the routes of a profile that a machine has for training."""
    return tuple(r for r in profile.packed_attention if r == "loop" or lacking(r, device) is None)


def lacking(route: str, device: torch.device) -> str | None:
    """Return what a machine lacks for a route that trains; None where nothing."""
    if route == "flex":
        return flex_lacking(device)
    if device.type != "cuda":
        return f"needs a CUDA GPU, and the device is {device.type}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < FLASH_CAPABILITY:
        return f"needs a GPU of compute capability {'.'.join(map(str, FLASH_CAPABILITY))}"
    if route == "varlen" and _varlen() is None:
        return f"is not part of torch {torch.__version__}"
    if route == "flash" and _flash() is None and _flash_3(device) is None:
        return "needs the flash-attn package"
    return None


def route_refusal(route: str, call: Call) -> str | None:
    """Return why a route cannot compute a call; None where it can."""
    if call.q.shape[0] != 1:
        return "takes one packed row at a time"
    return flex_refusal(call) if route == "flex" else lacking(route, call.q.device) or _ragged_refusal(route, call)


# --- one call per document -------------------------------------------------------------------------------------------


def per_document(
    module: nn.Module, layout: Layout, q: Tensor, k: Tensor, v: Tensor, prefixes: tuple[Prefix, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Call attention once per segment, (R, Hq, T, E) -> (R, Hq, T, Ev): what every other route must equal.

    `split` and `cat` keep the backward pass linear in the number of tokens.
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        # On a CPU, the backward pass of bfloat16 attention takes twice the time of the float32 one and rounds more.
        return per_document(module, layout, q.float(), k.float(), v.float(), prefixes, kwargs).to(torch.bfloat16)
    heads = q.shape[1]
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    lengths = [s.length for s in layout.segments]
    qs, ks, vs = q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2)
    causal = is_causal_in(module, kwargs)
    window = kwargs.get("sliding_window")
    outs: list[Tensor] = []
    for index, segment in enumerate(layout.segments):
        key, value, bias, free = ks[index], vs[index], None, 0
        if segment.parent is not None:
            free = lengths[segment.parent]
            key, value = torch.cat((ks[segment.parent], key), 2), torch.cat((vs[segment.parent], value), 2)
        for prefix in reversed(prefixes):
            key, value, bias = with_prefix(prefix, index, heads, key, value, bias)
        columns = key.shape[2] - free - segment.length
        mask = segment_mask(layout, segment.length, free, columns, causal, window, q.device)
        outs.append(attend_one(qs[index], key, value, mask, bias, causal and mask is None and segment.length > 1, kwargs))
    return torch.cat(outs, 2)


# --- keys of the segments one after another --------------------------------------------------------------------------


@dataclass(frozen=True)
class Ragged:
    """Where the queries and keys of each segment begin."""

    q_starts: Tensor
    """(S + 1,) int32"""
    k_starts: Tensor
    """(S + 1,) int32"""
    q_longest: int
    k_longest: int
    index: Tensor | None
    """(K,) columns of `Call.columns`, segment after segment: prefixes, parent, itself; None where they are so already."""


def ragged(layout: Layout, prefixes: tuple[Prefix, ...], device: torch.device) -> Ragged:
    """Return the starts and columns of all segments, computed on the host and copied once per batch."""
    sizes = tuple((p.k.shape[0], p.k.shape[2]) for p in prefixes)
    key = ("ragged", sizes, device)
    if key not in layout.cache:
        before = sum(count * size for count, size in sizes)
        columns: list[list[int]] = []
        for number, segment in enumerate(layout.segments):
            seen: list[int] = []
            first = 0
            for count, size in sizes:
                own = first + (number * size if count > 1 else 0)
                seen += range(own, own + size)
                first += count * size
            if segment.parent is not None:
                parent = layout.segments[segment.parent]
                seen += range(before + parent.start, before + parent.start + parent.length)
            columns.append([*seen, *range(before + segment.start, before + segment.start + segment.length)])
        queries = [s.length for s in layout.segments]
        keys = [len(c) for c in columns]
        plain = not before and queries == keys
        index = None if plain else to_device(torch.tensor([c for part in columns for c in part]), device)
        layout.cache[key] = Ragged(_starts(queries, device), _starts(keys, device), max(queries), max(keys), index)
    return layout.cache[key]


def _starts(lengths: list[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), device)


def _ragged_refusal(route: str, call: Call) -> str | None:
    size = call.q.shape[-1]
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return f"computes in float16 or bfloat16, and this model in {str(call.q.dtype).removeprefix('torch.')}"
    if size != call.v.shape[-1] or size % 8 or size > FLASH_HEAD_SIZE:
        return f"takes heads of one size, a multiple of 8 up to {FLASH_HEAD_SIZE} (here {size} and {call.v.shape[-1]})"
    if call.sinks is not None:
        return "has no attention sinks"
    if any(p.bias is not None for p in call.prefixes):
        return "has no bias of prefix columns"
    if call.window is not None and call.prefixes:
        return "cannot see a prefix beyond a sliding window"
    if route == "varlen" and (call.softcap is not None or call.dropout):
        return "has no soft cap and no dropout of attention"
    if route == "flash" and call.dropout and _flash() is None:
        return "has no dropout of attention in FlashAttention-3, and flash-attn 2 is not installed"
    return None


def _in_one_call(kernel: Callable[[Call, Tensor, Tensor, Tensor, Ragged, tuple[int, int]], Tensor], call: Call) -> Tensor:
    at = ragged(call.layout, call.prefixes, call.q.device)
    k, v = call.columns("k"), call.columns("v")
    if at.index is not None:
        k, v = k.index_select(0, at.index), v.index_select(0, at.index)
    # Both kernels count a window without the token itself, from the right end of the keys.
    reach = -1 if call.window is None else call.window - 1
    out = kernel(call, call.q[0].transpose(0, 1), k, v, at, (reach, 0 if call.causal else reach))
    return out.transpose(0, 1)[None]


def _varlen_kernel(call: Call, q: Tensor, k: Tensor, v: Tensor, at: Ragged, window: tuple[int, int]) -> Tensor:
    function: Any = _varlen()
    return function(
        q, k, v, at.q_starts, at.k_starts, at.q_longest, at.k_longest, scale=call.scale, window_size=window,
        enable_gqa=k.shape[1] != q.shape[1],
    )  # fmt: skip


def _flash_kernel(call: Call, q: Tensor, k: Tensor, v: Tensor, at: Ragged, window: tuple[int, int]) -> Tensor:
    newer: Any = None if call.dropout else _flash_3(q.device)
    function: Any = newer or _flash()
    more: dict[str, Any] = {} if newer else {"dropout_p": call.dropout}
    if "deterministic" in inspect.signature(function).parameters:
        # The package does not know torch's own switch.
        more["deterministic"] = torch.are_deterministic_algorithms_enabled()
    out = function(
        q, k, v, at.q_starts, at.k_starts, at.q_longest, at.k_longest, softmax_scale=call.scale, causal=call.causal,
        window_size=window, softcap=call.softcap or 0.0, **more,
    )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out


@functools.cache
def _varlen() -> Callable[..., Any] | None:
    """Return torch's variable-length attention, in builds whose version of it knows windows and grouped heads."""
    if not is_installed("torch.nn.attention.varlen"):
        return None
    function = load_module("torch.nn.attention.varlen").varlen_attn
    wanted = {"scale", "window_size", "enable_gqa"}
    return function if wanted <= set(inspect.signature(function).parameters) else None


@functools.cache
def _flash() -> Callable[..., Any] | None:
    return load_module("flash_attn").flash_attn_varlen_func if is_installed("flash_attn") else None


@functools.cache
def _flash_3(device: torch.device) -> Callable[..., Any] | None:
    """Return FlashAttention-3's kernel, in versions that know windows and soft caps; None on other GPUs than its own."""
    if device.type != "cuda" or not is_installed("flash_attn_interface"):
        return None
    if torch.cuda.get_device_capability(device)[0] != FLASH_3_CAPABILITY:
        return None
    function = load_module("flash_attn_interface").flash_attn_varlen_func
    wanted = {"softmax_scale", "causal", "window_size", "softcap"}
    return function if wanted <= set(inspect.signature(function).parameters) else None


COMPUTE: dict[str, Callable[[Call], Tensor]] = {
    "varlen": functools.partial(_in_one_call, _varlen_kernel),
    "flash": functools.partial(_in_one_call, _flash_kernel),
    "flex": attend_flex,
}
