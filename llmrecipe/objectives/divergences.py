"""Divergences of a student's distribution over the next token from a teacher's.

Letters: n positions, V tokens, K tokens kept of a distribution; P the teacher, Q the student.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmrecipe.objectives.token_math import log1mexp


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(P || Q) = sum_v P_v (log P_v - log Q_v), (n,), from log-probabilities (n, V)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def generalised_jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Return beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q, (n,), 0 < beta < 1.

    Source: generalised knowledge distillation (GKD, arXiv 2306.13649), equation 1.
    """
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * kl(log_p, log_m) + (1.0 - beta) * kl(log_q, log_m)


def divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> Tensor:
    """Return the divergence of a kind, (n,), from the teacher's and the student's log-probabilities (n, V).

    Args:
        kind: `forward_kl`, KL(P || Q); `reverse_kl`, KL(Q || P); or `jsd`.
        beta: of `jsd`.
    """
    if kind == "forward_kl":
        return kl(log_p, log_q)
    return kl(log_q, log_p) if kind == "reverse_kl" else generalised_jsd(log_p, log_q, beta)


def on_top_tokens(log_q: Tensor, ids: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of teacher and student over K kept tokens and one class for all others, (n, K + 1) each.

    A divergence over these classes is never above the one over all V tokens, and equal to it where K = V. Where all tokens are
    kept there is no class of others, (n, V).

    Args:
        log_q: (n, V) the student's log-probabilities.
        ids: (n, K) the kept tokens, distinct in a row.
        log_p: (n, K) the teacher's log-probabilities of them.
    """
    kept = log_q.gather(-1, ids)
    if ids.shape[-1] >= log_q.shape[-1]:
        return log_p, kept
    others = log_q.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    rest = log1mexp(log_p.logsumexp(-1, keepdim=True))
    return torch.cat([log_p, rest], -1), torch.cat([kept, others], -1)


def sorted_distance(p: Tensor, q: Tensor) -> Tensor:
    """Return sum_i |p_(i) - q_(i)|, (n,), of probabilities (n, V_p) and (n, V_q) sorted from the largest, padded by zeros.

    Source: universal logit distillation (ULD, arXiv 2402.12030).
    """
    width = max(p.shape[-1], q.shape[-1])
    both = (torch.nn.functional.pad(x.sort(-1, descending=True).values, (0, width - x.shape[-1])) for x in (p, q))
    one, other = both
    return (one - other).abs().sum(-1)
