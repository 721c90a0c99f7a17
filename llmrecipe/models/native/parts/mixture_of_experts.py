"""Mixture of experts: a feed-forward of N experts, of which each token uses k.

    p = softmax(W_r x)                                  W_r in R^(N, D), in float32 or wider
    y = sum_{e in top-k(p)} w_e expert_e(x) + shared(x)       w = p_e, or p_e / sum_{top-k} p with `norm_topk_prob`

With k = 1 that sum would make every weight 1, and the router would learn nothing from the task: set `norm_topk_prob: false`.
Each expert is a feed-forward (plain or gated) of width F_e, without biases. `num_shared_experts` of them see every token:
one feed-forward of width n F_e, times sigmoid(w_s x) with `shared_expert_gate`.

Load balancing: with c_e the share of tokens that use expert e and m_e the mean of p_e over the tokens of all layers,
L = N sum_e c_e m_e, which is k at even use and grows as tokens crowd; L * `router_aux_loss_coef` is added to the objective
while training (`output_router_logits`).

Config: num_experts (N; 0 for a dense feed-forward), num_experts_per_tok (k), moe_intermediate_size (F_e), norm_topk_prob,
num_shared_experts, shared_expert_gate, output_router_logits, router_aux_loss_coef.
Papers: Switch Transformer (arXiv 2101.03961), Mixtral (2401.04088), shared experts: DeepSeekMoE (2401.06066).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from llmrecipe.models.native.config import NativeConfig
from llmrecipe.models.native.parts.feed_forward import NativeFeedForward


class NativeRouter(nn.Module):
    """W_r, and the choice of experts."""

    def __init__(self, config: NativeConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.k, self.normed = config.num_experts_per_tok, config.norm_topk_prob

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (M, D) to logits (M, N), weights (M, k) and chosen experts (M, k)."""
        logits = nn.functional.linear(x, self.weight)
        shares = logits.softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
        weights, chosen = shares.topk(self.k, -1)
        if self.normed:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(x.dtype), chosen


class ShareOfToken(nn.Linear):
    """w_s: one number for each token."""

    def __init__(self, config: NativeConfig):
        super().__init__(config.hidden_size, 1, bias=False)


class _Experts(nn.Module):
    """All experts in 3-D tensors, (N, out, in), which kernels take whole and this loop takes expert by expert."""

    def __init__(self, config: NativeConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.expert_width()))

    def inner(self, x: Tensor, expert: int) -> Tensor:
        """Map (m, D) to what W_down of an expert reads, (m, F_e)."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum what the chosen experts say, (M, D) -> (M, D)."""
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            rows, places = (top_k_index == expert).nonzero(as_tuple=True)
            said = nn.functional.linear(self.inner(hidden_states[rows], expert), self.down_proj[expert])
            out = out.index_add(0, rows, said * top_k_weights[rows, places, None])
        return out


@use_experts_implementation
class GatedExperts(_Experts):
    """Experts with a gate: W_gate and W_up one above the other."""

    def __init__(self, config: NativeConfig):
        super().__init__(config)
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * config.expert_width(), config.hidden_size))

    def inner(self, x: Tensor, expert: int) -> Tensor:
        """Return f(W_gate x) * W_up x."""
        gate, up = nn.functional.linear(x, self.gate_up_proj[expert]).chunk(2, -1)
        return self.act_fn(gate) * up


@use_experts_implementation(has_gate=False)
class PlainExperts(_Experts):
    """Experts without a gate."""

    def __init__(self, config: NativeConfig):
        super().__init__(config)
        self.up_proj = nn.Parameter(torch.empty(config.num_experts, config.expert_width(), config.hidden_size))

    def inner(self, x: Tensor, expert: int) -> Tensor:
        """Return f(W_up x)."""
        return self.act_fn(nn.functional.linear(x, self.up_proj[expert]))


class NativeMixture(nn.Module):
    """Router, experts and what every token shares."""

    def __init__(self, config: NativeConfig):
        super().__init__()
        self.router = NativeRouter(config)
        self.experts = (GatedExperts if config.gated else PlainExperts)(config)
        shared = config.num_shared_experts
        self.shared_expert = NativeFeedForward(config, shared * config.expert_width()) if shared else None
        gate = shared and config.shared_expert_gate
        self.shared_expert_gate = ShareOfToken(config) if gate else None

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, T, D) -> (B, T, D)."""
        flat = x.flatten(0, -2)
        _, weights, chosen = self.router(flat)
        y = self.experts(flat, chosen, weights).view_as(x)
        if self.shared_expert is None:
            return y
        shared = self.shared_expert(x)
        return y + (shared if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * shared)
