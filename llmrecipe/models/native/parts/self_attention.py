"""Self-attention, the scaled dot product: A = softmax(Q K^T / sqrt(E) + mask), Y = A V, for one head.

Q, K, V in R^(T, E) are projections of the same states. The mask is 0 where query i may read key j and -inf elsewhere: a
decoder reads j <= i of its own document (causal), an encoder all real tokens. Dropout acts on A. Computed by the backend of
`model.attention` (eager below, sdpa, flash); softmax in float32 or wider.

Config: kind, dropout; positions: relative adds b[h, j - i] to the scores and leaves sqrt(E) out.
Paper: Attention Is All You Need (arXiv 1706.03762), section 3.2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """Compute attention of queries (B, H, T, E) over keys and values (B, G, S, E); return (B, T, H, E) and the weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = nn.functional.dropout(scores.softmax(-1, dtype=wide).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights
