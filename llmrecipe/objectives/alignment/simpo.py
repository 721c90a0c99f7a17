"""Simple preference optimisation, without a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipe.core.option_types import NonNegativeFloat, OpenFraction, PositiveFloat
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.alignment._engines.pairs import (
    PAIR_METRICS,
    WithoutMargin,
    collate_pairs,
    implicit_reward_metrics,
    logp_metrics,
    pair_count,
    policy_scores,
    refuse_soft,
)
from llmrecipe.objectives.base import Loss, Measures, Objective

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.recipe.schema import Recipe


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float, smoothing: float = 0.0) -> Tensor:
    """Compute -(1 - e) log sigma(u) - e log sigma(-u) of each pair, (P,), with u = beta (chosen - rejected) - gamma.

    Args:
        chosen: (P,) mean log-probabilities of the chosen answers.
        rejected: (P,) those of the rejected answers.
        smoothing: e.
    """
    u = beta * (chosen - rejected) - gamma
    return -(1.0 - smoothing) * F.logsigmoid(u) - smoothing * F.logsigmoid(-u)


@register
class Simpo(WithoutMargin, Objective):
    """SimPO: L = -(1/P) sum log sigma(beta (S_w/n_w - S_l/n_l) - gamma), S the summed log-probability of an answer.

    The reward is what generation maximises, the length-averaged log-probability, so there is no reference model; gamma is the
    margin by which a chosen answer must win. It needs a small learning rate: nothing keeps the policy near its initial state.

    Paper: SimPO: Simple Preference Optimization with a Reference-Free Reward (arXiv 2405.14734).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    rows: ClassVar[str] = "preference"
    head: ClassVar[str] = "causal"
    dropout: ClassVar[bool] = False

    beta: PositiveFloat = 2.0
    """Scale of the reward."""
    gamma: NonNegativeFloat = 1.0
    """Target margin between the rewards (the paper's gamma; its ratio to beta is 0.3 to 0.5 in most of its runs)."""
    label_smoothing: OpenFraction = 0.0
    """Assumed share of flipped labels."""

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse soft labels.

        Raises:
            DataError: naming a row.
        """
        refuse_soft(data, "simpo")

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay out pairs that share their prompt."""
        return collate_pairs(rows, roles, soft="simpo")

    def measures(self) -> Measures:
        """Return the metrics of both answers."""
        return PAIR_METRICS

    def weight(self, batch: Batch) -> float:
        """Return the number of pairs, the loss denominator."""
        return float(pair_count(batch))

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed loss of the pairs."""
        scores = policy_scores(batch, roles)
        chosen, rejected = scores.token_means()
        metrics = {**implicit_reward_metrics(self.beta * chosen, self.beta * rejected), **logp_metrics(scores)}
        return Loss(torch.sum(simpo_loss(chosen, rejected, self.beta, self.gamma, self.label_smoothing)), metrics)
