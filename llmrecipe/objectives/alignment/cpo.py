"""Contrastive preference optimization: preference and behaviour cloning in one stage, without a reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipe.core.option_types import Literal, NonNegativeFloat, OpenFraction, PositiveFloat
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

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.recipe.schema import Recipe


def cpo_loss(chosen: Tensor, rejected: Tensor, beta: float, loss_type: str = "sigmoid", smoothing: float = 0.0) -> Tensor:
    """Return the preference loss of each pair, with u = chosen - rejected and e the label smoothing:

        sigmoid    -(1 - e) log sigma(beta u) - e log sigma(-beta u)
        hinge      max(0, 1 - beta u)
        ipo        (u - 1 / (2 beta))^2

    Args:
        chosen: (P,) log-probabilities of the chosen answers.
        rejected: (P,) log-probabilities of the rejected answers.

    Returns:
        (P,) losses.

    Examples:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> round(float(cpo_loss(zero, zero, beta=0.1)), 4)
        0.6931
    """
    u = chosen - rejected
    if loss_type == "hinge":
        return torch.relu(1.0 - beta * u)
    if loss_type == "ipo":
        return (u - 1.0 / (2.0 * beta)) ** 2
    return -(1.0 - smoothing) * F.logsigmoid(beta * u) - smoothing * F.logsigmoid(-beta * u)


@register
class Cpo(WithoutMargin, Objective):
    """CPO: L = (1/P) sum -log sigma(beta (S_w - S_l)) + bc_weight NLL(chosen), S the summed log-probability of an answer.

    DPO with a uniform reference, whose log-ratios cancel, so one model is in memory; the behaviour-cloning term keeps the
    likelihood of chosen answers from falling with that of the rejected ones. NLL is the mean over the tokens of the chosen
    answers of a step. With `loss_type: ipo` S is the mean log-probability of a token.

    Paper: Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation
    (arXiv 2401.08417). Extensions as in TRL: label smoothing, the hinge of SLiC (arXiv 2305.10425), the squared loss of IPO
    (arXiv 2310.12036).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    rows: ClassVar[str] = "preference"
    head: ClassVar[str] = "causal"
    dropout: ClassVar[bool] = False

    beta: PositiveFloat = 0.1
    """Scale of the difference of log-probabilities."""
    bc_weight: NonNegativeFloat = 1.0
    """Weight of the behaviour-cloning term (TRL's cpo_alpha)."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """Shape of the preference loss."""
    label_smoothing: OpenFraction = 0.0
    """Assumed share of flipped labels, for `sigmoid`."""

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse soft labels.

        Raises:
            DataError: naming a row.
        """
        refuse_soft(data, "cpo")

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay out pairs that share their prompt."""
        return collate_pairs(rows, roles, soft="cpo")

    def batches(self, source: Iterable[list[dict[str, Any]]], roles: Roles) -> Iterator[list[Batch]]:
        """Yield micro-batches that know how many tokens the whole step has: the likelihood is a mean over them."""
        for rows in source:
            yield share_tokens([self.collate(part, roles) for part in roles.split(rows)], roles)

    def measures(self) -> Measures:
        """Return the metrics of both answers and the parts of the loss."""
        return {**PAIR_METRICS, "preference_loss": "min", "nll": "min"}

    def weight(self, batch: Batch) -> float:
        """Return the number of pairs, the loss denominator."""
        return float(pair_count(batch))

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed loss of the pairs."""
        preference, nll, metrics = self._parts(batch, roles)
        return Loss(preference + self.bc_weight * pairs_per_token(batch) * nll, metrics)

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Return both terms; `finish_evaluation` joins them over the whole split."""
        preference, _, metrics = self._parts(batch, roles)
        return {"preference_loss": (preference, self.weight(batch)), **metrics}

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, Tensor]) -> dict[str, float]:
        """Return the whole loss of the split."""
        return {"loss": sums["preference_loss"] + self.bc_weight * sums["nll"]}

    def _parts(self, batch: Batch, roles: Roles) -> tuple[Tensor, Tensor, dict[str, tuple[Any, float]]]:
        """Return (preference loss summed over pairs, NLL summed over chosen tokens, metrics)."""
        t = roles.policy(batch)["logprobs"]
        scores = policy_scores(batch, roles, t)
        chosen, rejected = scores.token_means() if self.loss_type == "ipo" else (scores.chosen, scores.rejected)
        nll, tokens = answer_nll(batch, t)
        metrics = {
            **implicit_reward_metrics(self.beta * chosen, self.beta * rejected),
            **logp_metrics(scores),
            "nll": (nll.detach(), tokens),
        }
        losses = cpo_loss(chosen, rejected, self.beta, self.loss_type, self.label_smoothing)
        return losses.sum(), nll, metrics
