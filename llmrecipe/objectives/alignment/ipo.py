"""Identity preference optimisation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from llmrecipe.core.option_types import Literal, NonNegativeFloat, PositiveFloat, RefSync
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.alignment._engines.pairs import (
    PAIR_METRICS,
    PairScores,
    WithoutMargin,
    collate_pairs,
    implicit_reward_metrics,
    log_ratios,
    logp_metrics,
    pair_count,
    refuse_soft,
)
from llmrecipe.objectives.alignment._engines.references import check_reference, follow
from llmrecipe.objectives.base import Loss, Measures, Objective

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.recipe.schema import Recipe


def ipo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Compute (chosen - rejected - 1 / (2 beta))^2 of each pair, (P,), from log-ratios, (P,) each."""
    return (chosen - rejected - 1.0 / (2.0 * beta)) ** 2


def regulariser(chosen: Tensor, rejected: Tensor, chosen_mean: Tensor, kind: str) -> Tensor:
    """Compute R of each pair, (P,), from log-ratios, (P,), and the chosen answer's mean log-probability S_w / n_w, (P,).

    l2_logratio  (chosen^2 + rejected^2) / 2
    identity     (chosen - rejected)^2
    nll          -chosen_mean
    """
    if kind == "identity":
        return (chosen - rejected) ** 2
    if kind == "nll":
        return -chosen_mean
    return (chosen**2 + rejected**2) / 2.0


@register
class Ipo(WithoutMargin, Objective):
    """IPO: L = (1/P) sum (rho_w - rho_l - 1/(2 beta))^2, rho = log pi(y|x) - log pi_ref(y|x), beta the paper's tau.

    The target is a margin of 1/(2 beta), not infinity: certain preferences do not pull the policy away without bound, and the
    loss rises again where the margin overshoots. With `average` (the default, and what the authors of the paper say they
    computed) rho is divided by its own answer's number of tokens; without it rho is the sum, as the paper writes it, and a
    good beta is smaller by about the answers' length. At step 0 the loss is 1/(4 beta^2).

    `loss_type: sigmoid_reg` is a different loss: the DPO loss plus `reg_coef` times a regulariser of the log-ratios.

    Paper: A General Theoretical Paradigm to Understand Learning from Human Preferences (arXiv 2310.12036).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    rows: ClassVar[str] = "preference"
    head: ClassVar[str] = "causal"
    roles: ClassVar[tuple[str, ...]] = ("reference",)
    dropout: ClassVar[bool] = False

    beta: PositiveFloat = 0.1
    """Sets the target margin, 1 / (2 beta)."""
    average: bool = True
    """Divide each log-ratio by its answer's number of tokens."""
    loss_type: Literal["squared", "sigmoid_reg"] = "squared"
    """IPO's squared distance, or the logistic loss with a regulariser."""
    regularizer: Literal["l2_logratio", "identity", "nll"] = "l2_logratio"
    """R of `sigmoid_reg`."""
    reg_coef: NonNegativeFloat = 0.01
    """Weight of R."""
    reference: Literal["initial", "base", "none"] | str = "initial"
    """The policy of step 0, the model without any stack, no reference at all, or the folder of a model or finished run."""
    ref_sync: RefSync | None = None
    """{alpha, steps}: the reference follows the policy (TR-DPO); for stacks that train the base's own weights."""

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse invalid references and rows with soft labels.

        Raises:
            RecipeError: naming the key and what is allowed.
            DataError: rows with soft labels.
        """
        check_reference(recipe, self.reference, self.ref_sync)
        refuse_soft(data, "ipo")

    def reference_of(self) -> str:
        """Return the `reference` option."""
        return self.reference

    def reference_moves(self) -> bool:
        """Return whether the reference follows the policy: with `ref_sync` it does."""
        return self.ref_sync is not None

    def after_step(self, step: int, metrics: Mapping[str, float], roles: Roles) -> None:
        """Move the reference towards the policy every `ref_sync.steps` steps."""
        follow(self.ref_sync, step, roles)

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay out pairs that share their prompt."""
        return collate_pairs(rows, roles, soft="ipo")

    def measures(self) -> Measures:
        """Return the metrics of both answers and, for the squared loss, the gap that has a target."""
        return PAIR_METRICS if self.loss_type == "sigmoid_reg" else {**PAIR_METRICS, "ipo/delta": None}

    def weight(self, batch: Batch) -> float:
        """Return the number of pairs, the loss denominator."""
        return float(pair_count(batch))

    def step_zero(self) -> dict[str, float]:
        """Return a loss of 1 / (4 beta^2), or log 2 where the regulariser is 0, and margins of 0."""
        wanted = {"rewards/margins": 0.0, "ipo/delta": 0.0}
        if self.loss_type == "squared":
            wanted["loss"] = 1.0 / (4.0 * self.beta**2)
        elif self.regularizer != "nll":
            wanted["loss"] = math.log(2.0)
        return wanted

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed loss of the pairs; rewards are beta times the summed log-ratio, averaged or not."""
        scores, chosen, rejected, _ = log_ratios(batch, roles, self.reference)
        metrics = {**implicit_reward_metrics(self.beta * chosen, self.beta * rejected), **logp_metrics(scores)}
        if self.loss_type == "sigmoid_reg":
            return Loss(self._sigmoid(scores, chosen, rejected).sum(), metrics)
        if self.average:
            chosen, rejected = chosen / scores.chosen_tokens, rejected / scores.rejected_tokens
        metrics["ipo/delta"] = ((chosen - rejected).detach().sum(), float(chosen.shape[0]))
        return Loss(ipo_loss(chosen, rejected, self.beta).sum(), metrics)

    def _sigmoid(self, scores: PairScores, chosen: Tensor, rejected: Tensor) -> Tensor:
        extra = regulariser(chosen, rejected, scores.chosen / scores.chosen_tokens, self.regularizer)
        return -F.logsigmoid(self.beta * (chosen - rejected)) + self.reg_coef * extra
