"""What objectives that sample report of a batch of answers, each metric as (sum, count).

Letters: B answers, N tokens of all answers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmrecipe.data.collate import Batch
from llmrecipe.methods._base.late_values import Largest, Smallest
from llmrecipe.objectives.alignment._engines.by_answer import answer_count, sum_by_answer
from llmrecipe.objectives.alignment._engines.sampler_mismatch import sampler_metrics
from llmrecipe.objectives.base import Loss, Measures


def with_old(batch: Batch, logprobs: Tensor) -> Batch:
    """Return the batch with the log-probabilities of the policy that sampled, (N,), and the divergence of each answer, (B,).

    Where they have not been measured the rollout makes one update, and those of its own pass are the same.

    Args:
        logprobs: (N,) of the pass with gradients.
    """
    if "old" in batch.extra:
        return batch
    old = logprobs.detach()
    kl = old - batch.extra["reference"] if "reference" in batch.extra else torch.zeros_like(old)
    return batch.with_extra(old=old, kl=sum_by_answer(batch, kl))


def reward_metrics(batch: Batch) -> dict[str, tuple[Any, float]]:
    """Return each reward's scores and measures as (sum, count) over the answers it has an opinion of (NaN: it has none)."""
    own = {name: value for name, value in batch.here.extra.items() if name.startswith("rewards/")}
    return {name: (value.nan_to_num(0.0).sum(), float(value.numel() - value.isnan().sum())) for name, value in own.items()}


def rollout_metrics(batch: Batch, beta: float | Tensor) -> dict[str, tuple[Any, float]]:
    """Return metrics of the answers, as (sum, count): scores, divergence of a whole answer, lengths, ends, sampler."""
    extra, count = batch.extra, float(answer_count(batch))
    metrics: dict[str, tuple[Any, float]] = {"objective/scores": (extra["score"].sum(), count)}
    metrics |= reward_metrics(batch)
    if "reference" in extra:
        metrics["objective/kl"] = (extra["kl"].sum(), count)
        metrics["objective/non_score_reward"] = (-(beta * extra["kl"]).sum(), count)
        metrics["objective/rlhf_reward"] = ((extra["score"] - beta * extra["kl"]).sum(), count)
    lengths = batch.here.extra["length"]
    metrics["response/length"] = (lengths.sum(), count)
    metrics["response/length_min"] = Smallest(lengths.min() if count else 0.0, count)
    metrics["response/length_max"] = Largest(lengths.max() if count else 0.0, count)
    # Seconds are split in proportion to tokens, so that any part of a rollout shows the rate of the whole.
    metrics["response/tokens_per_s"] = (lengths.sum(), float(lengths.sum() * batch.here.extra["pace"]))
    metrics["response/eos_rate"] = (extra["finished"].sum(), count)
    metrics["response/no_opinion"] = (extra["no_opinion"] * count, count)
    return metrics | sampler_metrics(batch)


HELD_OUT_METRICS: Measures = {"score": "max", "kl": None, "length": None, "eos_rate": None, "no_opinion": None}
"""Metrics that `held_out_metrics` reports besides the single rewards, and whether less or more of each is better."""


def held_out_metrics(batch: Batch) -> dict[str, tuple[Any, float]]:
    """Return metrics of held-out prompts; `loss` is the negative score, so that less is better as everywhere else.

    The score is the mean over the answers of which a reward has an opinion.
    """
    extra, count = batch.extra, float(answer_count(batch))
    scores = batch.here.extra["score"]
    known = ~scores.isnan()
    total, scored = scores[known].sum(), float(known.sum())
    metrics: dict[str, tuple[Any, float]] = {"loss": (-total, scored), "score": (total, scored)}
    metrics |= reward_metrics(batch)
    if "reference" in extra:
        metrics["kl"] = (extra["kl"].sum(), count)
    metrics["length"] = (extra["length"].sum(), count)
    metrics["eos_rate"] = (extra["finished"].sum(), count)
    metrics["no_opinion"] = (count - scored, count)
    return metrics


def ratio_metrics(log_ratio: Tensor, clipped: Tensor, entropy: Tensor) -> dict[str, tuple[Any, float]]:
    """Measure how far the policy has moved from the one that sampled; the variance of the ratio is taken around 1.

    Args:
        log_ratio: (N,) per token or (B,) per answer.
        clipped: bool, in the same shape.
        entropy: (N,) per token.
    """
    log_ratio = log_ratio.detach()
    ratio = log_ratio.exp()
    count = float(log_ratio.numel())
    return {
        "policy/approxkl": (0.5 * (log_ratio**2).sum(), count),
        "policy/clipfrac": (clipped.float().sum(), float(clipped.numel())),
        "policy/ratio": (ratio.sum(), count),
        "policy/ratio_var": (((ratio - 1.0) ** 2).sum(), count),
        "policy/ratio_max": Largest(ratio.max() if count else 0.0, count),
        "objective/entropy": (entropy.sum(), float(entropy.numel())),
    }


def with_metrics(total: Tensor, *groups: dict[str, tuple[Any, float]]) -> Loss:
    """Build a loss from its total, a scalar, with the metrics of several groups."""
    return Loss(total, {name: value for group in groups for name, value in group.items()})
