"""Attention calls over packed rows of every kind that a route may be asked for, and kernels that stand in for a GPU's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmrecipe.core.forward_context import Layout, Segment
from llmrecipe.models.attention_calls import Prefix
from llmrecipe.models.packed_attention import per_document
from llmrecipe.models.packed_call import Call

DOCUMENTS = [(5, None), (1, None), (7, None)]
SHARED = [(4, None), (3, 0), (2, 0), (6, None), (3, 3)]
"""(length, parent): two answers of the first prompt, one of the second."""
CASES: dict[str, dict[str, Any]] = {
    "causal documents": {},
    "shared prompts": {"segments": SHARED},
    "bidirectional documents": {"causal": False},
    "bidirectional windows": {"causal": False, "window": 3},
    "sliding windows": {"window": 3},
    "windows over shared prompts": {"segments": SHARED, "window": 3},
    "one prefix for all": {"prefixes": [(1, 2)]},
    "a prefix for each segment": {"segments": SHARED, "prefixes": [(5, 2), (1, 3)]},
    "heads in groups": {"groups": 2},
    "heads in groups behind a prefix": {"groups": 2, "prefixes": [(1, 2)], "segments": SHARED},
    "a scale of its own": {"scale": 0.3},
    "values of another size": {"value": 6},
    "soft cap": {"softcap": 1.5},
    "soft cap, windows and shared prompts": {"softcap": 1.5, "window": 2, "segments": SHARED},
    "sinks": {"sinks": True},
    "sinks, windows and groups": {"sinks": True, "window": 3, "groups": 1},
    "a biased prefix": {"prefixes": [(1, 2), (1, 1)], "bias": True},
    "a prefix beyond the window": {"prefixes": [(3, 2)], "window": 2},
}


def layout_of(segments: list[tuple[int, int | None]]) -> Layout:
    """One row of segments given as (length, parent)."""
    starts = [sum(n for n, _ in segments[:i]) for i in range(len(segments))]
    found = tuple(Segment(0, at, n, parent) for at, (n, parent) in zip(starts, segments, strict=True))
    return Layout(found, 1, sum(n for n, _ in segments))


def call_of(
    segments: list[tuple[int, int | None]] = DOCUMENTS,
    causal: bool = True,
    window: int | None = None,
    prefixes: list[tuple[int, int]] = [],  # noqa: B006
    groups: int = 4,
    value: int = 8,
    softcap: float | None = None,
    sinks: bool = False,
    scale: float | None = None,
    bias: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    size: int = 8,
) -> Call:
    """A call with random tensors of four query heads; `value` is a size of values beside keys of 8."""
    value = value * size // 8
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    layout = layout_of(segments)
    made = tuple(
        Prefix(random(n, groups, own, size), random(n, groups, own, value), random(own) if bias and own == 2 else None)
        for n, own in prefixes
    )
    tokens = layout.columns
    q, k, v = random(1, 4, tokens, size), random(1, groups, tokens, size), random(1, groups, tokens, value)
    return Call(layout, q, k, v, made, causal, window, softcap, random(4) if sinks else None, scale, 0.0)


def loop(call: Call) -> Tensor:
    """What the loop over documents gives for a call."""
    module = nn.Module()
    module.is_causal = call.causal
    given = {"sliding_window": call.window, "softcap": call.softcap, "s_aux": call.sinks, "scaling": call.scale}
    return per_document(module, call.layout, call.q, call.k, call.v, call.prefixes, given)


def leaves(call: Call) -> list[Tensor]:
    """The tensors a call is differentiated by."""
    found = [call.q, call.k, call.v, *(x for p in call.prefixes for x in (p.k, p.v))]
    return found if call.sinks is None else [*found, call.sinks]


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """What FlashAttention documents of variable lengths: query i of n sees keys i + m - n - left to i + m - n + right of m."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    assert enable_gqa or q.shape[1] == k.shape[1]
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    outs = []
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        scores = torch.einsum("qhe,khe->hqk", q[a:b], k[c:d]) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = torch.tanh(scores / softcap) * softcap if softcap else scores
        n, m = int(b - a), int(d - c)
        ahead = torch.arange(m)[None] - torch.arange(m - n, m)[:, None]
        left, right = window_size
        seen = ((ahead >= -left) | (left < 0)) & ((ahead <= right) | (right < 0))
        outs.append(torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, float("-inf")).softmax(-1), v[c:d]))
    return torch.cat(outs)


def flash(q: Tensor, k: Tensor, v: Tensor, *more: Any, dropout_p: float, softmax_scale: float | None, causal: bool,
          window_size: tuple[int, int], softcap: float, deterministic: bool = False) -> tuple[Tensor, None]:  # fmt: skip
    """The same by the signature of the flash-attn package, which is told whether torch wants deterministic kernels."""
    assert window_size[1] == 0 or not causal
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    return varlen(q, k, v, *more, scale=softmax_scale, window_size=window_size, enable_gqa=True, softcap=softcap), None


def flash_3(q: Tensor, k: Tensor, v: Tensor, *more: Any, softmax_scale: float | None, causal: bool,
            window_size: tuple[int, int], softcap: float) -> Tensor:  # fmt: skip
    """The same by the signature of FlashAttention-3, which has no dropout."""
    return flash(
        q, k, v, *more, dropout_p=0.0, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )[0]  # fmt: skip
