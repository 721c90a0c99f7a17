"""Mathematics shared by the next-token objectives: the summed negative log-likelihood of a batch's targets."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from llmrecipe.data.collate import Batch, Sequence, pad
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.base import Loss, Measures
from llmrecipe.objectives.examples import padded_on_host

LOG_HALF = -math.log(2.0)


def negative_log_likelihood(
    logprobs: Tensor, smoothing: float = 0.0, uniform: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Return -sum_n w_n [(1 - e) t_n + e u_n], a scalar.

    Args:
        logprobs: (N,) t_n = log p(y_n).
        smoothing: e.
        uniform: (N,) u_n, the mean log-probability over the vocabulary; needed where e is above 0.
        weights: (N,) w_n; default 1.
    """
    if not smoothing:
        return -_weighted(logprobs, weights).sum()
    if uniform is None:
        raise ValueError("label smoothing needs the mean log-probability over the vocabulary")
    return -_weighted((1.0 - smoothing) * logprobs + smoothing * uniform, weights).sum()


def dynamic_fine_tuning(logprobs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return -sum_n w_n sg(p_n) t_n, a scalar, from (N,) t_n = log p_n: tokens weighted by their own detached probability.

    Args:
        weights: (N,) w_n; default 1.

    Source: dynamic fine-tuning (DFT, arXiv 2508.05629).
    """
    return -_weighted(logprobs.detach().exp() * logprobs, weights).sum()


def _weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    return values if weights is None else values * weights.to(values.dtype)


def log1mexp(x: Tensor) -> Tensor:
    """Compute log(1 - e^x) elementwise for x < 0, in the shape of x.

    It uses expm1 above -log 2 and log1p below, so neither end loses precision. A probability of 1 gives the logarithm of the
    smallest step below it rather than minus infinity.
    """
    x = x.clamp_max(-torch.finfo(x.dtype).tiny)
    near = x > LOG_HALF
    # Each branch sees only values it is exact for; the other branch's gradient would be 0 times infinity.
    close = torch.log(-torch.expm1(torch.where(near, x, torch.full_like(x, LOG_HALF))))
    far = torch.log1p(-torch.exp(torch.where(near, torch.full_like(x, LOG_HALF), x)))
    return torch.where(near, close, far)


def sequences_of(rows: list[dict[str, Any]], apart: bool = False) -> list[Sequence]:
    """Convert token rows with `ids` and `trained` to sequences; the prompt ends at the first trained token.

    Args:
        apart: a row of several documents (`data.blocks`) gives a sequence for each.
    """
    found: list[Sequence] = []
    for row in rows:
        start = 0
        for length in row["documents"] if apart and "documents" in row else [len(row["ids"])]:
            trained = row["trained"][start : start + length]
            first = next((i for i, t in enumerate(trained) if t), len(trained))
            found.append(Sequence(row["ids"][start : start + length], trained, prompt=first, task=int(row.get("task", 0))))
            start += length
    return found


def collate_tokens(rows: list[dict[str, Any]], roles: Roles) -> Batch:
    """Lay rows out for one forward pass; encoder-decoder models read the prompt and predict the rest."""
    if roles.engine.is_pair_model:
        parts = sequences_of(rows)
        prompts = [list(s.ids[: s.prompt]) for s in parts]
        answers = [Sequence(s.ids[s.prompt :], s.trained[s.prompt :], task=s.task) for s in parts]
        return pair_batch(prompts, answers, [row["row"] for row in rows], roles)
    return roles.layout(sequences_of(rows, apart=roles.packing), [row["row"] for row in rows])


def pair_batch(texts: Seq[list[int]], answers: Seq[Sequence], rows: Seq[int], roles: Roles) -> Batch:
    """Lay rows out for an encoder-decoder.

    Args:
        texts: what the encoder reads; a padding token where it is nothing.
        answers: what the decoder predicts, from its first token on.
        rows: indices of the rows in their data set.
    """
    start = int(roles.model.config.decoder_start_token_id)
    decoder = [Sequence([start, *s.ids], [0, *s.trained], task=s.task) for s in answers]
    encoder = [ids or [roles.pad_id] for ids in texts] or [[roles.pad_id]]
    ids, mask = padded_on_host(encoder, roles.pad_id)
    batch = pad(decoder, roles.pad_id, rows=rows, extra={"encoder_ids": ids, "encoder_mask": mask})
    return batch.to(roles.device)


TOKEN_METRICS: Measures = {"nll": "min", "accuracy": "max"}
"""Metrics that `token_loss` reports, and whether less or more of each is better."""


def token_loss(batch: Batch, roles: Roles, kind: str = "nll", z_loss: float = 0.0) -> Loss:
    """Compute the summed loss of a batch's targets, with accuracy and the plain negative log-likelihood as metrics.

    Targets count by `extra["weights"]` (N,) where rows have weights; the metrics are of every target alike.

    Args:
        z_loss: weight of the penalty sum_n (log Z_n)^2, which is added while training and reported by itself.
    """
    out = roles.policy(batch, normalizer=True) if z_loss else roles.policy(batch)
    logprobs, weights = out["logprobs"], batch.extra.get("weights")
    of_kind = dynamic_fine_tuning if kind == "dft" else negative_log_likelihood
    loss = Loss(of_kind(logprobs, weights=weights), token_metrics(out))
    if not z_loss:
        return loss
    penalty = out["normalizer"].square().sum()
    squares = {"log_z_squared": (penalty.detach(), float(logprobs.numel()))}
    return Loss(loss.total, loss.metrics | squares, auxiliary=z_loss * penalty)


def target_weights(rows: list[dict[str, Any]]) -> Tensor | None:
    """Return the weights (N,) of the targets of token rows, 1 in rows without; None where no row has any."""
    if not any(row.get("weights") for row in rows):
        return None
    found: list[float] = []
    for row in rows:
        weights = row.get("weights") or [1.0] * len(row["trained"])
        found += [weight for weight, trained in zip(weights, row["trained"], strict=True) if trained]
    return torch.tensor(found)


def token_metrics(out: dict[str, Tensor]) -> dict[str, tuple[Tensor, float]]:
    """Return the metrics of the targets of a batch, (sum, count) each, from what the engine computed."""
    count = float(out["logprobs"].numel())
    return {"nll": (-out["logprobs"].detach().sum(), count), "accuracy": (out["correct"].sum(), count)}
