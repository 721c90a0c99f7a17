"""Odds-ratio preference optimisation: supervised fine-tuning and preference in one stage, without a reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from llmrecipe.core.option_types import Literal, NonNegativeFloat
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.alignment._engines.pairs import (
    PAIR_METRICS,
    WithoutMargin,
    answer_nll,
    collate_pairs,
    implicit_reward_metrics,
    logp_metrics,
    pair_count,
    pairs_per_token,
    policy_scores,
    refuse_soft,
    share_tokens,
)
from llmrecipe.objectives.base import Loss, Measures, Objective
from llmrecipe.objectives.token_math import log1mexp

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.recipe.schema import Recipe


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Compute log [odds(e^chosen) / odds(e^rejected)], odds(p) = p / (1 - p), (P,), from log-probabilities < 0, (P,) each.

    It equals (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected)).

    Examples:
        >>> import torch
        >>> half, third = torch.log(torch.tensor([1 / 2])), torch.log(torch.tensor([1 / 3]))
        >>> round(float(log_odds_ratio(half, third).exp()), 4)
        2.0
    """
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def orpo_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Compute -log sigma(log odds ratio) of each pair, (P,), from mean log-probabilities < 0, (P,) each."""
    return -F.logsigmoid(log_odds_ratio(chosen, rejected))


@register
class Orpo(WithoutMargin, Objective):
    """ORPO: L = NLL(chosen) + odds_weight (1/P) sum -log sigma(log odds_w - log odds_l), odds = p / (1 - p).

    p is the length-averaged likelihood of an answer, exp(S/n). One model, no reference. The likelihood is a mean over tokens:
    of prompt and chosen answer (`nll_on: all`, as the authors and the reference trainer do) or of the chosen answer alone. It
    also teaches the answers themselves, so it needs the learning rate of fine-tuning, not DPO's.

    Paper: ORPO: Monolithic Preference Optimization without Reference Model (arXiv 2403.07691).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    rows: ClassVar[str] = "preference"
    head: ClassVar[str] = "causal"
    dropout: ClassVar[bool] = False

    odds_weight: NonNegativeFloat = 0.1
    """Weight of the odds-ratio term (the paper's lambda)."""
    nll_on: Literal["all", "completion"] = "all"
    """Tokens of the likelihood term: prompt and chosen answer, or the chosen answer."""

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse soft labels.

        Raises:
            DataError: naming a row.
        """
        refuse_soft(data, "orpo")

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay out pairs that share their prompt, whose tokens are targets too where the likelihood covers it."""
        return collate_pairs(rows, roles, prompt_targets=self.nll_on == "all", soft="orpo")

    def batches(self, source: Iterable[list[dict[str, Any]]], roles: Roles) -> Iterator[list[Batch]]:
        """Yield micro-batches with the number of tokens of the whole step: the likelihood is a mean over them."""
        for rows in source:
            yield share_tokens([self.collate(part, roles) for part in roles.split(rows)], roles)

    def measures(self) -> Measures:
        """Return the metrics of both answers, and the parts of the loss."""
        return {**PAIR_METRICS, "odds_loss": "min", "nll": "min", "log_odds_chosen": "max", "log_odds_ratio": "max"}

    def weight(self, batch: Batch) -> float:
        """Return the number of pairs, the loss denominator."""
        return float(pair_count(batch))

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed loss of the pairs."""
        odds, nll, metrics = self._parts(batch, roles)
        return Loss(pairs_per_token(batch) * nll + self.odds_weight * odds, metrics)

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Return the odds-ratio term and the likelihood, which `finish_evaluation` adds up over the whole split."""
        odds, _, metrics = self._parts(batch, roles)
        return {"odds_loss": (odds, self.weight(batch)), **metrics}

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, Tensor]) -> dict[str, float]:
        """Return the whole loss of the split."""
        return {"loss": sums["nll"] + self.odds_weight * sums["odds_loss"]}

    def _parts(self, batch: Batch, roles: Roles) -> tuple[Tensor, Tensor, dict[str, tuple[Any, float]]]:
        logprobs = roles.policy(batch)["logprobs"]
        scores = policy_scores(batch, roles, logprobs)
        chosen, rejected = scores.token_means()
        nll, tokens = answer_nll(batch, logprobs)
        count = float(chosen.shape[0])
        ratio = log_odds_ratio(chosen.detach(), rejected.detach())
        metrics = {
            **implicit_reward_metrics(self.odds_weight * chosen, self.odds_weight * rejected),
            **logp_metrics(scores),
            "nll": (nll.detach(), tokens),
            "log_odds_chosen": (ratio.sum(), count),
            "log_odds_ratio": (F.logsigmoid(ratio).sum(), count),
        }
        return orpo_loss(chosen, rejected).sum(), nll, metrics
