"""How far the sampler's log-probabilities are from those of the policy it stands for, and the correction for it.

Letters: B answers, N tokens of all answers, mu the sampler, pi_old the sampling policy as training computes it.

The sampler decodes with a cache, in other shapes and on other kernels than training, or in another program, so mu and
pi_old differ by rounding at least, and by more where a server computes in lower precision or holds stale weights.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmrecipe.data.collate import Batch
from llmrecipe.methods._base.late_values import Largest

KEY = "sampler"
"""Name of the sampler's log-probabilities, (N,), in a batch."""


def sampler_metrics(batch: Batch) -> dict[str, tuple[Any, float]]:
    """Return the difference of log-probabilities, its largest size, and KL(mu || pi_old), as (sum, count) over N tokens.

    KL is estimated by r - 1 - log r, r = pi_old / mu.
    """
    log_ratio = _log_ratio(batch)
    size, count = log_ratio.abs(), float(log_ratio.numel())
    return {
        "sampler/logprob_diff": (size.sum(), count),
        "sampler/logprob_diff_max": Largest(size.max() if count else 0.0, count),
        "sampler/kl": ((log_ratio.expm1() - log_ratio).sum(), count),
    }


def sampler_weights(batch: Batch, of: str, cap: float) -> Tensor:
    """Compute truncated importance weights min(pi_old / mu, cap) of every token, (N,), or of whole answers, (B,).

    The answers come from mu while the loss takes them for answers of pi_old; weighted, its expectation is that under pi_old
    wherever the ratio stays below the cap, and the cap bounds its variance (IMPALA, arXiv 1802.01561).

    Args:
        of: `token` or `sequence`, whose ratio is the product over its tokens.
    """
    log_ratio = _log_ratio(batch)
    if of == "sequence":
        answers = batch.extra["score"].numel()
        log_ratio = log_ratio.new_zeros(answers).index_add(0, batch.extra["answer"], log_ratio)
    return log_ratio.exp().clamp(max=cap)


def weight_metrics(weights: Tensor, cap: float) -> dict[str, tuple[Any, float]]:
    """Return the mean weight and the share of weights that the cap cut, as (sum, count)."""
    count = float(weights.numel())
    return {"sampler/weight": (weights.sum(), count), "sampler/capped": ((weights >= cap).float().sum(), count)}


def _log_ratio(batch: Batch) -> Tensor:
    return batch.extra["old"] - batch.extra[KEY]
