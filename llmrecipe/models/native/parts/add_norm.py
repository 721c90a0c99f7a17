"""Add & norm, the residual connection around attention and feed-forward f. Config: pre_norm, dropout.

    post    y = norm(x + dropout(f(x)))      the original; needs learning-rate warm-up
    pre     y = x + dropout(f(norm(x)))      and one norm after the last block; trains without warm-up

With pre-norm, the layers that write into the residual stream start smaller by 1 / sqrt(2 L), L blocks, so that its variance
does not grow with depth.
Papers: Attention Is All You Need (arXiv 1706.03762), section 3.1; On Layer Normalization in the Transformer (2002.04745).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class IntoResidual(nn.Linear):
    """A linear layer whose output is added to the residual stream; pre-norm models initialize it smaller."""


def add_norm(x: Tensor, part: Callable[[Tensor], Tensor], norm: nn.Module, drop: nn.Module, pre_norm: bool) -> Tensor:
    """Return the residual sum of a part, (B, T, D) -> (B, T, D)."""
    return x + drop(part(norm(x))) if pre_norm else norm(x + drop(part(x)))
