"""Identity preference optimisation."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from llmrecipe.core.option_types import Literal, NonNegativeFloat, PositiveFloat, RefSync
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.alignment._engines.pairs import (
    PAIR_METRICS,
    PairScores,
    collate_pairs,
    log_ratios,
    logp_metrics,
    pair_count,
    refuse_soft,
    reward_metrics,
)
from llmrecipe.objectives.alignment._engines.references import check_reference, follow
from llmrecipe.objectives.base import Loss, Measures, Objective


def ipo_loss(rho_w: Tensor, rho_l: Tensor, beta: float) -> Tensor:
    """(rho_w - rho_l - 1 / (2 beta))^2 of each pair, (P,)."""
    return (rho_w - rho_l - 1.0 / (2.0 * beta)) ** 2


def regulariser(r_w: Tensor, r_l: Tensor, mean_w: Tensor, kind: str) -> Tensor:
    """R of each pair, (P,), from log-ratios r and the chosen answer's mean log-probability.

    l2_logratio  (r_w^2 + r_l^2) / 2
    identity     (r_w - r_l)^2
    nll          -S_w / n_w
    """
    if kind == "identity":
        return (r_w - r_l) ** 2
    if kind == "nll":
        return -mean_w
    return (r_w**2 + r_l**2) / 2.0


@register
class Ipo(Objective):
    """IPO: L = (1/P) sum (rho_w - rho_l - 1/(2 beta))^2, rho = log pi(y|x) - log pi_ref(y|x), beta the paper's tau.

    A margin of 1/(2 beta) is the goal, not infinity: certain preferences do not pull the policy away without end, and the
    loss rises again where the margin overshoots. With `average` (the default, and what the authors of the paper say they
    computed) rho is divided by its own answer's number of tokens; without it rho is the sum of the paper's letter, and a good
    beta is smaller by about the answers' length. At step 0 the loss is 1/(4 beta^2).

    `loss_type: sigmoid_reg` is another objective: the DPO loss plus `reg_coef` times a regulariser of the log-ratios.

    Paper: A General Theoretical Paradigm to Understand Learning from Human Preferences (arXiv 2310.12036).
    """

    rows: ClassVar[str] = "preference"
    head: ClassVar[str] = "causal"
    roles: ClassVar[tuple[str, ...]] = ("reference",)
    dropout: ClassVar[bool] = False

    beta: PositiveFloat = 0.1
    """The margin aimed at is 1 / (2 beta)."""
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

    def check(self, recipe: Any, data: Any) -> None:
        """Refuse references that cannot be.

        Raises:
            RecipeError: naming the key and what is allowed.
            DataError: rows with soft labels.
        """
        check_reference(recipe, self.reference, self.ref_sync)
        refuse_soft(data, "ipo")

    def reference_of(self) -> str:
        """The `reference` option."""
        return self.reference

    def reference_moves(self) -> bool:
        """With `ref_sync`."""
        return self.ref_sync is not None

    def after_step(self, step: int, metrics: dict[str, float], roles: Roles) -> None:
        """The reference moves towards the policy when it is time."""
        follow(self.ref_sync, step, roles)

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Pairs that share their prompt."""
        return collate_pairs(rows, roles, soft="ipo")

    def measures(self) -> Measures:
        """Those of both answers and, in the squared loss, the gap that it aims at."""
        return PAIR_METRICS if self.loss_type == "sigmoid_reg" else {**PAIR_METRICS, "ipo/delta": None}

    def weight(self, batch: Batch) -> float:
        """Pairs."""
        return float(pair_count(batch))

    def step_zero(self) -> dict[str, float]:
        """1 / (4 beta^2), or log 2 where the regulariser is 0; margins of 0."""
        wanted = {"rewards/margins": 0.0, "ipo/delta": 0.0}
        if self.loss_type == "squared":
            wanted["loss"] = 1.0 / (4.0 * self.beta**2)
        elif self.regularizer != "nll":
            wanted["loss"] = math.log(2.0)
        return wanted

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Summed loss of the pairs; rewards are beta times the summed log-ratio, averaged or not."""
        scores, r_w, r_l, _ = log_ratios(batch, roles, self.reference)
        metrics = {**reward_metrics(self.beta * r_w, self.beta * r_l), **logp_metrics(scores)}
        if self.loss_type == "sigmoid_reg":
            return Loss(self._sigmoid(scores, r_w, r_l).sum(), metrics)
        if self.average:
            r_w, r_l = r_w / scores.chosen_tokens, r_l / scores.rejected_tokens
        metrics["ipo/delta"] = ((r_w - r_l).detach().sum(), float(r_w.shape[0]))
        return Loss(ipo_loss(r_w, r_l, self.beta).sum(), metrics)

    def _sigmoid(self, scores: PairScores, r_w: Tensor, r_l: Tensor) -> Tensor:
        extra = regulariser(r_w, r_l, scores.chosen / scores.chosen_tokens, self.regularizer)
        return -F.logsigmoid(self.beta * (r_w - r_l)) + self.reg_coef * extra
