"""The load-balancing loss of mixtures of experts: L = N sum_e c_e m_e.

Over the tokens of all layers, c_e is the share that uses expert e (so the c_e sum to k) and m_e the mean of its router
probability p_e = softmax(z)_e. At even use L = k; it grows as tokens crowd into few experts, N sum_e c_e m_e <= N. Gradients
flow through m alone.

Any family takes part whose backbone returns `router_logits` and whose config says `output_router_logits` and
`router_aux_loss_coef`, as Transformers' mixtures do. Source: Switch Transformers (arXiv 2101.03961), equations 4 to 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmrecipe.core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def load_balancing_loss(router_logits: Sequence[Tensor], k: int, mask: Tensor | None = None) -> Tensor:
    """Return L, a scalar.

    Args:
        router_logits: for each layer z (R * T, N), or (R, T, N).
        k: experts of one token.
        mask: (R, T') ones on real tokens. It ends where the rows end: with a cache it also covers earlier tokens, and where
            it is shorter the tokens before it are virtual ones of a method, which count.
    """
    layers = [logits.reshape(-1, logits.shape[-1]) for logits in router_logits]
    experts = layers[0].shape[-1]
    weight = _weights(mask, layers[0])
    tokens = (weight.sum() * len(layers)).clamp(min=1)
    each = weight.repeat_interleave(k)
    used = share = torch.zeros(experts, device=weight.device)
    for logits in layers:
        probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        used = used.index_add(0, probabilities.topk(k, -1).indices.flatten(), each)
        share = share + weight.to(probabilities.dtype) @ probabilities
    return experts * (used * share).sum() / tokens**2


def _weights(mask: Tensor | None, flat: Tensor) -> Tensor:
    """Return 1 for each row of (M, N) that counts and 0 for padding, (M,)."""
    ones = torch.ones(len(flat), device=flat.device)
    if mask is None:
        return ones
    by_row = ones.view(mask.shape[0], -1).clone()
    width = min(by_row.shape[1], mask.shape[1])
    by_row[:, -width:] = mask[:, -width:].to(by_row.dtype)
    return by_row.flatten()


def auxiliary_loss(config: PreTrainedConfig, outputs: object, mask: Tensor | None = None) -> Tensor | None:
    """Return the load-balancing loss of a pass times its weight; None where the model requires none.

    Args:
        outputs: what the backbone returned.
        mask: (R, T) ones on real tokens.

    Raises:
        ModelError: the config requires it and the backbone recorded no router logits.
    """
    text = config.get_text_config()
    weight, k = getattr(text, "router_aux_loss_coef", 0.0), getattr(text, "num_experts_per_tok", None)
    if not weight or not getattr(text, "output_router_logits", False):
        return None
    logits = getattr(outputs, "router_logits", None)
    if k is None or not logits or not all(isinstance(z, Tensor) for z in logits):
        raise ModelError(
            f"model.config.output_router_logits: {text.model_type} gives no router logits that a load-balancing loss could be "
            "computed from (a compiled model records none); false trains without that loss"
        )
    return weight * load_balancing_loss(logits, k, mask)
