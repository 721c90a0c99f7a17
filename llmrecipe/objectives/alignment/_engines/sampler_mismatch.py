"""How far the sampler's log-probabilities are from those of the policy it stands for, and the correction for it.

Letters: B answers, N tokens of all answers, mu the sampler, pi_old the sampling policy as training computes it.

The sampler decodes with a cache, in other shapes and on other kernels than training, or in another program, so mu and
pi_old differ by rounding at least, and by more where a server computes in lower precision or holds stale weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmrecipe.data.collate import Batch
from llmrecipe.methods._base.late_values import Largest
from llmrecipe.objectives.alignment._engines.by_answer import sum_by_answer
from llmrecipe.objectives.alignment._engines.kl import kl_estimate

if TYPE_CHECKING:
    from llmrecipe.engine.role_models import Roles

KEY = "sampler"
"""Name of the sampler's log-probabilities, (N,), in a batch."""
VISIBLE = 0.1
"""Mean difference of log-probabilities that is warned of; bfloat16 stays below it."""


def sampler_metrics(batch: Batch) -> dict[str, tuple[Any, float]]:
    """Return the difference of log-probabilities, its largest size, and KL(mu || pi_old), as (sum, count) over N tokens.

    KL is estimated by k3 (see `kl`), r - 1 - log r, r = pi_old / mu.
    """
    log_ratio = _log_ratio(batch)
    size, count = log_ratio.abs(), float(log_ratio.numel())
    return {
        "sampler/logprob_diff": (size.sum(), count),
        "sampler/logprob_diff_max": Largest(size.max() if count else 0.0, count),
        "sampler/kl": (kl_estimate(batch.extra[KEY], batch.extra["old"], "k3").sum(), count),
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
        log_ratio = sum_by_answer(batch, log_ratio)
    return log_ratio.exp().clamp(max=cap)


def weight_metrics(weights: Tensor, cap: float) -> dict[str, tuple[Any, float]]:
    """Return the mean weight and the share of weights that the cap cut, as (sum, count)."""
    count = float(weights.numel())
    return {"sampler/weight": (weights.sum(), count), "sampler/capped": ((weights >= cap).float().sum(), count)}


def warn_of_mismatch(tokens: Sequence[dict[str, Tensor]], roles: Roles) -> None:
    """Warn, once a run, where the sampler's log-probabilities are further from training's than rounding takes them.

    Args:
        tokens: of each answer, with its entries `sampler` and `old`.
    """
    if roles.events is None or not tokens:
        return
    apart = float(torch.cat([own["old"] - own[KEY] for own in tokens]).abs().mean())
    if apart > VISIBLE:
        roles.events.warning(
            f"the sampler's log-probabilities differ from those of training by more than {VISIBLE} on average: answers come "
            "from another distribution than the loss assumes. See sampler/logprob_diff; objective.sampler_correction=token "
            "corrects for it, and a server needs --logprobs-mode processed_logprobs where objective.temperature is not 1",
            once=True,
        )


def _log_ratio(batch: Batch) -> Tensor:
    return batch.extra["old"] - batch.extra[KEY]
