"""Attention of packed rows by FlexAttention, with a block mask made from the layout.

It computes attention sinks, biased prefixes and prefixes with a sliding window. Letters: Hq query heads, T tokens of the packed
row, E and Ev key and value head sizes, C columns (those of prefixes, then the tokens).

Sources: Flex Attention (arXiv 2412.05496), gpt-oss (sinks; arXiv 2508.10925).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmrecipe.core.forward_context import Layout
from llmrecipe.core.lazy import load_module
from llmrecipe.data.transfer import to_device
from llmrecipe.models.attention_calls import Prefix, in_reach
from llmrecipe.models.packed_call import Call
from llmrecipe.models.recompiled import recompiled

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

LEAST_HEAD_SIZE = 16
"""Of its kernels of a GPU, which multiply tiles."""


def _flex_module() -> ModuleType:
    return load_module("torch.nn.attention.flex_attention")


def flex_lacking(device: torch.device) -> str | None:
    """Return what a machine lacks for training with FlexAttention; None where nothing."""
    if device.type != "cuda":
        return "has no backward pass on a CPU"
    known = hasattr(_flex_module(), "AuxRequest")
    return None if known else f"needs a newer torch than {torch.__version__}"


def flex_refusal(call: Call) -> str | None:
    """Return why FlexAttention cannot compute a call; None where it can."""
    if call.dropout:
        return "has no dropout of attention"
    if call.q.dtype == torch.float64 and call.q.device.type == "cuda":
        return "computes in float32 or less"
    if call.q.device.type == "cuda" and (least := min(call.q.shape[-1], call.v.shape[-1])) < LEAST_HEAD_SIZE:
        return f"takes heads of {LEAST_HEAD_SIZE} or more (here {least})"
    if call.q.device.type != "cuda" and torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v)):
        return flex_lacking(call.q.device)
    return None


def segment_rule(
    layout: Layout, prefixes: tuple[Prefix, ...], causal: bool, window: int | None, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return FlexAttention's `mask_mod`: whether query q sees column k, prefix columns first."""
    sizes = [(p.k.shape[0], p.k.shape[2]) for p in prefixes]
    of_prefix = [s if count > 1 else -1 for count, size in sizes for s in range(count) for _ in range(size)]
    owner: list[int] = []
    place: list[int] = []
    parent: list[int] = []
    offset: list[int] = []
    for number, segment in enumerate(layout.segments):
        above = -2 if segment.parent is None else segment.parent
        owner += [number] * segment.length
        place += range(segment.length)
        parent += [above] * segment.length
        offset += [0 if segment.parent is None else layout.segments[above].length] * segment.length
    before = len(of_prefix)
    columns = [[*of_prefix, *owner], [0] * before + place, [0] * before + parent, [0] * before + offset]
    # A block mask is made from numbers of all T x C pairs, so they are narrow.
    owners, places, parents, offsets = to_device(torch.tensor(columns, dtype=torch.int32), device).unbind(0)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q = q + before
        own, above = owners[k] == owners[q], owners[k] == parents[q]
        at = places[k] + torch.where(own, offsets[k], 0)
        token = (own | above) & in_reach(places[q] + offsets[q], at, causal, window)
        return torch.where(k < before, (owners[k] < 0) | own, token)

    return sees


def block_mask(call: Call) -> BlockMask:
    """Return FlexAttention's block mask of a call, made once per batch for each width of window and set of prefixes."""
    device, layout = call.q.device, call.layout
    sizes = tuple((p.k.shape[0], p.k.shape[2]) for p in call.prefixes)
    key = ("block mask", sizes, call.causal, call.window, device)
    if key not in layout.cache:
        rule = segment_rule(layout, call.prefixes, call.causal, call.window, device)
        tokens = call.q.shape[2]
        columns = tokens + sum(count * size for count, size in sizes)
        layout.cache[key] = _flex_module().create_block_mask(rule, None, None, tokens, columns, device=device)
    return layout.cache[key]


def _score(call: Call) -> Callable[..., Tensor] | None:
    """Return FlexAttention's `score_mod`: the soft cap, then the bias of prefix columns."""
    cap, bias = call.softcap, None
    if any(p.bias is not None for p in call.prefixes):
        parts = [(p.k.new_zeros(p.k.shape[2]) if p.bias is None else p.bias).repeat(p.k.shape[0]) for p in call.prefixes]
        bias = torch.cat([*(x.to(call.q.dtype) for x in parts), call.q.new_zeros(call.q.shape[2])])
    if cap is None and bias is None:
        return None

    def changed(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        capped = score if cap is None else torch.tanh(score / cap) * cap
        return capped if bias is None else capped + bias[k]

    return changed


def attend_flex(call: Call) -> Tensor:
    """Compute attention of a packed row, (1, Hq, T, E) -> (1, Hq, T, Ev)."""
    k, v = (call.columns(name).transpose(0, 1)[None] for name in ("k", "v"))
    out, aux = _flex_function(call.q.device.type)(
        call.q, k, v, _score(call), block_mask(call), call.scale, k.shape[1] != call.q.shape[1],
        return_aux=_flex_module().AuxRequest(lse=call.sinks is not None),
    )  # fmt: skip
    if call.sinks is None:
        return out
    # A logit s without a value scales a head's output by Z / (Z + e^s), Z the sum of exp over the columns seen.
    kept = torch.sigmoid(aux.lse - call.sinks.to(aux.lse.dtype).view(1, -1, 1))
    return out * kept.to(out.dtype)[..., None]


@functools.cache
def _flex_function(device: str) -> Callable[..., Any]:
    """Return FlexAttention, compiled where there is a kernel: as it stands it writes out all T x C scores."""
    function: Callable[..., Any] = _flex_module().flex_attention
    # With and without gradients, windows, one block and several, each first for shapes that stay: more than torch allows.
    return recompiled(function) if device == "cuda" else function
