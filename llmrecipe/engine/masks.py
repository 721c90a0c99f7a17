"""Attention masks of rows that are read otherwise than their model reads text.

Letters: R rows, T columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(mask: Tensor, prompts: Tensor | None = None) -> Tensor:
    """Return (R, 1, T, T), true where a token may see another: real tokens up to itself, the whole prompt, and always itself.

    Args:
        mask: (R, T) ones on real tokens.
        prompts: (R,) length of the prompt with which each row begins; default: none has one.
    """
    order = torch.arange(mask.shape[1], device=mask.device)
    seen = order[None, :] <= order[:, None]
    if prompts is not None:
        seen = seen | (order < prompts[:, None])[:, None, :]
    seen = seen & mask.bool()[:, None, :]
    return (seen | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device))[:, None]
