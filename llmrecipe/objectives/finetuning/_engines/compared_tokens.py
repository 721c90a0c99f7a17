"""Next-token losses that read whole distributions: label smoothing, and the divergence from the model a run starts from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from llmrecipe.engine.logprob import NOTHING
from llmrecipe.objectives.base import Loss
from llmrecipe.objectives.divergences import kl
from llmrecipe.objectives.embedding_noise import without_noise
from llmrecipe.objectives.token_math import TOKEN_METRICS, dynamic_fine_tuning, negative_log_likelihood, token_metrics

if TYPE_CHECKING:
    from llmrecipe.data.collate import Batch
    from llmrecipe.engine.role_models import Roles

KL = "kl_to_base"
"""Name of the metric: nats a token."""


def compared_loss(batch: Batch, roles: Roles, kind: str, smoothing: float, strength: float) -> Loss:
    """Compute the summed loss of the targets, metrics as `token_loss`, with what depends on every token of the vocabulary.

    The divergence sum_n w_n KL(p_0 || p)_n, p_0 the model of step 0, is added as `auxiliary` and reported as `kl_to_base`.
    Logits of both models exist for a chunk of targets at a time.

    Args:
        kind: `nll` or `dft`.
        smoothing: share of each target that is spread over the vocabulary, of `nll`.
        strength: weight of the divergence; 0: the model of step 0 is not evaluated.
    """
    base = roles.reference_states(without_noise(batch)) if strength else None

    def compare(z: Tensor, rows: slice) -> dict[str, Tensor]:
        y, log_q = batch.target[rows], z.log_softmax(-1)
        own = log_q.gather(-1, y[:, None]).squeeze(-1)
        found = {"logprobs": own, "correct": (z.detach().argmax(-1) == y).float()}
        if smoothing:
            found["uniform"] = log_q.mean(-1)
        if base is not None:
            found[KL] = kl(roles.reference_logits(base[rows]).to(z.dtype).log_softmax(-1), log_q)
        return found

    out, weights = roles.policy(batch, compare=compare), batch.extra.get("weights")
    if NOTHING in out:
        names = [*TOKEN_METRICS, *([KL] if strength else [])]
        return Loss(out[NOTHING].sum(), dict.fromkeys(names, (0.0, 0.0)))
    if kind == "dft":
        total = dynamic_fine_tuning(out["logprobs"], weights)
    else:
        total = negative_log_likelihood(out["logprobs"], smoothing, out.get("uniform"), weights)
    loss = Loss(total, token_metrics(out))
    if base is None:
        return loss
    apart = out[KL]
    weighted = apart if weights is None else apart * weights.to(apart.dtype)
    measured = {KL: (apart.detach().sum(), float(apart.numel()))}
    return replace(loss, metrics=loss.metrics | measured, auxiliary=strength * weighted.sum())
