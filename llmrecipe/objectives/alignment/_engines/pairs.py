"""Code shared by the pair objectives: a prompt, a chosen and a rejected answer, and their summed log-probabilities."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from llmrecipe.core.errors import DataError
from llmrecipe.data.collate import Batch, Sequence, row_key
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.base import Measures

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows


@dataclass(frozen=True)
class PairScores:
    """Log-probabilities of a micro-batch of P pairs."""

    chosen: Tensor
    """(P,) summed over the chosen answer's tokens."""
    rejected: Tensor
    """(P,)"""
    chosen_tokens: Tensor
    """(P,) number of answer tokens."""
    rejected_tokens: Tensor

    def token_means(self) -> tuple[Tensor, Tensor]:
        """Return the mean log-probability of a token of each chosen (P,) and each rejected answer (P,)."""
        return self.chosen / self.chosen_tokens.clamp_min(1.0), self.rejected / self.rejected_tokens.clamp_min(1.0)


class WithoutMargin:
    """Mixin for an `Objective` on pairs that does not read their margins, which are a reward model's."""

    headline: ClassVar[tuple[str, ...]] = ("rewards/accuracies", "rewards/margins")

    def unread(self) -> tuple[str, ...]:
        """Return the column of the margins."""
        return ("margin",)


def refuse_soft(data: SplitRows, why: str) -> None:
    """Refuse rows whose `p` is a soft label.

    Args:
        data: the training rows.
        why: objective or option that does not support them, for the message.

    Raises:
        DataError: naming the first such row.
    """
    found = next(((i, p) for i, p in enumerate(data.column("p")) if p not in (None, 1.0)), None)
    if found is not None:
        raise _soft(*found, why)


def _soft(row: int, p: float, why: str) -> DataError:
    return DataError(
        f"row {row}: p is {p:g}: {why} does not support the probability that the chosen answer is the better one; use "
        "objective=dpo with loss_type=sigmoid, or objective=reward, or labels without it (label_ai: hard: true)"
    )


def collate_pairs(
    rows: list[dict[str, Any]], roles: Roles, prompt_targets: bool = False, soft: str | None = "this objective"
) -> Batch:
    """Lay out three sequences for each pair: the prompt, once, and both answers that continue it.

    A packed batch contains each prompt once; padded rows repeat it before each answer.

    Args:
        prompt_targets: score the prompt's tokens too, once for each pair.
        soft: objective or option that does not support the rows' `p`; None keeps it as `extra["p"]`, (P,) (1 where a row has
            none).

    Raises:
        DataError: a row has a soft label that would be ignored.
    """
    sequences: list[Sequence] = []
    for row in rows:
        at = len(sequences)
        prompt = row["prompt_ids"]
        sequences.append(Sequence(prompt, [int(prompt_targets)] * len(prompt), prompt=len(prompt)))
        for answer in (row["chosen_ids"], row["rejected_ids"]):
            sequences.append(Sequence(answer, [1] * len(answer), parent=at))
    extra: dict[str, Tensor] = {}
    labels = [1.0 if r.get("p") is None else float(r["p"]) for r in rows]
    if soft is None:
        if any(p != 1.0 for p in labels):
            extra["p"] = torch.tensor(labels)
    else:
        for row, p in zip(rows, labels, strict=True):
            if p != 1.0:
                raise _soft(row["row"], p, soft)
    batch = roles.layout(sequences, [r["row"] for r in rows], extra)
    keys = tuple(row_key(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in rows)
    return dataclasses.replace(batch, keys=keys)


def pair_count(batch: Batch) -> int:
    """Return P, the number of pairs; an empty micro-batch holds one placeholder sequence and no pair."""
    return batch.sequences // 3


def split_pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Split one value per sequence, (3P,), into those of the chosen (P,) and rejected (P,) answers."""
    usable = values[: values.shape[0] // 3 * 3].view(-1, 3)
    return usable[:, 1], usable[:, 2]


def policy_scores(batch: Batch, roles: Roles, logprobs: Tensor | None = None) -> PairScores:
    """Sum log-probabilities under the policy, in one forward pass for both answers.

    Args:
        logprobs: (N,) token log-probabilities of the policy, where they are known already.
    """
    if logprobs is None:
        logprobs = roles.policy(batch)["logprobs"]
    chosen, rejected = split_pairs(batch.sum_by_sequence(logprobs))
    chosen_tokens, rejected_tokens = split_pairs(batch.counts())
    return PairScores(chosen, rejected, chosen_tokens, rejected_tokens)


def reference_scores(batch: Batch, roles: Roles) -> tuple[Tensor, Tensor]:
    """Return the summed log-probabilities of chosen (P,) and rejected (P,) answers under the reference."""
    return split_pairs(roles.reference(batch))


def log_ratios(batch: Batch, roles: Roles, which: str = "initial") -> tuple[PairScores, Tensor, Tensor, Tensor]:
    """Compute the log-ratios S_pi - S_ref of both answers; S_ref = 0 where there is no reference.

    The reference runs before the policy, so that no adapter is switched between the policy's forward and backward pass.

    Returns:
        (scores, log-ratios of the chosen (P,) and of the rejected (P,) answers, the policy's token log-probabilities (N,)).
    """
    with torch.no_grad():
        zero = torch.zeros(pair_count(batch), device=roles.device)
        reference = (zero, zero) if which == "none" else reference_scores(batch, roles)
    logprobs = roles.policy(batch)["logprobs"]
    scores = policy_scores(batch, roles, logprobs)
    return scores, scores.chosen - reference[0], scores.rejected - reference[1], logprobs


def answer_nll(batch: Batch, logprobs: Tensor) -> tuple[Tensor, float]:
    """Return the negative log-likelihood summed over the targets outside rejected answers, a scalar, and their number.

    Args:
        logprobs: (N,) token log-probabilities.
    """
    kept = batch.sequence % 3 != 2
    return -(logprobs * kept).sum(), float(_outside_rejected(batch))


def share_tokens(micros: list[Batch], roles: Roles) -> list[Batch]:
    """Give every micro-batch P / M of the whole step: pairs over likelihood targets of all micro-batches and processes.

    A summed likelihood times this ratio, summed over the step and divided by P, is the mean over the step's tokens.
    """
    pairs, tokens = roles.sum(
        [
            sum(float(pair_count(m)) for m in micros),
            sum(float(_outside_rejected(m)) for m in micros),
        ]
    )
    scale = torch.tensor([pairs / max(tokens, 1.0)])
    return [m.with_extra(pairs_per_token=scale) for m in micros]


def pairs_per_token(batch: Batch) -> Tensor | float:
    """Return the ratio that `share_tokens` gave the batch, a scalar; a batch on its own counts as the whole step."""
    given = batch.extra.get("pairs_per_token")
    if given is not None:
        return given.squeeze()
    return float(pair_count(batch)) / max(float(_outside_rejected(batch)), 1.0)


def _outside_rejected(batch: Batch) -> int:
    """Return the number of targets outside rejected answers."""
    return int((batch.here.sequence % 3 != 2).sum())


PAIR_METRICS: Measures = {
    "rewards/accuracies": "max",
    "rewards/margins": "max",
    "rewards/chosen": None,
    "rewards/rejected": None,
    "logps/chosen": None,
    "logps/rejected": None,
}
"""Metrics that `implicit_reward_metrics` and `logp_metrics` report; the level of one answer alone is neither good nor bad."""


def logp_metrics(scores: PairScores) -> dict[str, tuple[Any, float]]:
    """Return the mean summed log-probabilities of both answers, as (sum, count)."""
    count = float(scores.chosen.shape[0])
    return {
        "logps/chosen": (scores.chosen.detach().sum(), count),
        "logps/rejected": (scores.rejected.detach().sum(), count),
    }


def implicit_reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, tuple[Any, float]]:
    """Return metrics of implicit rewards, (P,) each: means, margin, and how often the chosen reward is strictly larger."""
    count = float(chosen.shape[0])
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "rewards/chosen": (chosen.sum(), count),
        "rewards/rejected": (rejected.sum(), count),
        "rewards/margins": ((chosen - rejected).sum(), count),
        "rewards/accuracies": ((chosen > rejected).float().sum(), count),
    }
