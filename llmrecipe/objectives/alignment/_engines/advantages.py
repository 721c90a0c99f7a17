"""Advantages and the clipped losses that use them: pure functions, checked by hand-worked numbers in their test.

Notation: B answers, T token slots, P prompts, G answers a prompt, N tokens of a batch in one flat list. Slots at or after an
answer's length never reach a result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Sum = Callable[[list[float]], list[float]]
"""Adds numbers up over all processes."""


def one_process(values: list[float]) -> list[float]:
    """Return the values, which are their own sum over one process."""
    return values


def group_relative(scores: Tensor, scale: str = "group", eps: float = 1e-4, total: Sum = one_process) -> Tensor:
    """Compute (s - mean of its group) / (std + eps): (P, G) scores -> (P, G) advantages (GRPO, arXiv 2402.03300).

    A score that is NaN belongs to an answer that was left out: it stays NaN and is no part of its group. An answer that is
    alone in its group has an advantage of 0.

    Args:
        scale: `group` divides by the group's standard deviation, `batch` by that of all scores, `none` not at all
            (Dr. GRPO, arXiv 2503.20783). Standard deviations divide by n - 1.
    """
    centred, count = _centred(scores)
    if scale == "none":
        return centred
    if scale == "group":
        return centred / ((centred**2).nan_to_num(0.0).sum(1, keepdim=True).div((count - 1).clamp(min=1)).sqrt() + eps)
    return centred / (float(moments(scores[~scores.isnan()], total)[1] ** 0.5) + eps)


def leave_one_out(scores: Tensor) -> Tensor:
    """Compute s_i - mean of the other answers' scores: (P, G) scores -> (P, G) advantages (RLOO, arXiv 2402.14740).

    NaN and single answers are as in `group_relative`.
    """
    centred, count = _centred(scores)
    return centred * (count / (count - 1).clamp(min=1))


def _centred(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores minus the mean of their group, (P, G), and the number of scores of each group, (P, 1); NaN is no score."""
    count = (~scores.isnan()).sum(1, keepdim=True).to(scores.dtype)
    return scores - scores.nan_to_num(0.0).sum(1, keepdim=True) / count, count


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Estimate generalised advantages (arXiv 1506.02438).

        delta_t = r_t + gamma V_{t+1} - V_t        V past the end is 0
        A_t = delta_t + gamma lam A_{t+1}          R_t = A_t + V_t

    Args:
        rewards: (B, T).
        values: (B, T), V_t is the value of the state before token t.
        lengths: (B,) real slots of each row.

    Returns:
        Advantages (B, T) and returns (B, T), 0 after the end.
    """
    real = torch.arange(rewards.shape[1], device=rewards.device)[None] < lengths[:, None]
    rewards, values = rewards.masked_fill(~real, 0.0), values.masked_fill(~real, 0.0)
    after = torch.cat([values[:, 1:], values.new_zeros(values.shape[0], 1)], 1)
    delta = rewards + gamma * after - values
    advantages = torch.zeros_like(rewards)
    running = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        running = delta[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, (advantages + values).masked_fill(~real, 0.0)


def moments(values: Tensor, total: Sum = one_process) -> tuple[float, float]:
    """Compute mean and variance (divided by n - 1) of numbers of any shape, spread over several processes, in two passes."""
    flat = values.detach().double()
    first, count = total([float(flat.sum()), float(flat.numel())])
    mean = first / max(count, 1.0)
    (second,) = total([float(((flat - mean) ** 2).sum())])
    return mean, second / max(count - 1.0, 1.0)


def whiten(values: Tensor, total: Sum = one_process, shift: bool = True) -> Tensor:
    """Compute (x - mean) / sqrt(var + 1e-8), (N,) -> (N,), over the tokens of all processes; `shift=False` keeps the mean."""
    mean, variance = moments(values, total)
    white = (values - mean) * float((variance + 1e-8) ** -0.5)
    return white if shift else white + mean


def clipped_policy_loss(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Compute max(-A rho, -A clip(rho, 1 - low, 1 + high)) elementwise, in the shape of `ratio` (PPO, arXiv 1707.06347)."""
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - low, 1.0 + high))


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Compute max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2 elementwise, in the shape of `values`.

    Without a clip it is the plain square, (V - R)^2 / 2.
    """
    plain = (values - returns) ** 2
    if clip is None:
        return 0.5 * plain
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum(plain, (near - returns) ** 2)


def clipped_values(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Return 1 where the clipped square is the larger one and its gradient is cut off, else 0, in the shape of `values`."""
    if clip is None:
        return torch.zeros_like(values)
    near = old + (values - old).clamp(-clip, clip)
    return ((near - returns) ** 2 > (values - returns) ** 2).to(values.dtype)


def clipped_share(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Return True where clipping cuts the gradient off, in the shape of `ratio`."""
    return ((ratio < 1.0 - low) & (advantages < 0)) | ((ratio > 1.0 + high) & (advantages > 0))
