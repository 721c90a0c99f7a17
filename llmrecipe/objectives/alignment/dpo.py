"""Direct preference optimisation."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipe.data.batch import Batch
from llmrecipe.fields import Literal, NonNegativeFloat, OpenFraction, PositiveFloat
from llmrecipe.objectives.alignment.pairs import (
    collate_pairs,
    pair_count,
    policy_scores,
    reference_scores,
    reward_metrics,
)
from llmrecipe.objectives.objective import Loss, Objective
from llmrecipe.registry import register
from llmrecipe.training.roles import Roles


def dpo_loss(h: Tensor, loss_type: str = "sigmoid", smoothing: float = 0.0) -> Tensor:
    """Loss of each pair from h = beta (r_w - r_l), (P,).

    sigmoid  -(1 - e) log sigma(h) - e log sigma(-h)         (e = 0: DPO; e > 0: conservative DPO)
    robust   [-(1 - e) log sigma(h) + e log sigma(-h)] / (1 - 2e)
    hinge    relu(1 - h)
    """
    if loss_type == "hinge":
        return F.relu(1.0 - h)
    if loss_type == "robust":
        return (-(1.0 - smoothing) * F.logsigmoid(h) + smoothing * F.logsigmoid(-h)) / (1.0 - 2.0 * smoothing)
    return -(1.0 - smoothing) * F.logsigmoid(h) - smoothing * F.logsigmoid(-h)


@register
class Dpo(Objective):
    """DPO: L = -(1/P) sum log sigma(beta (r_w - r_l)), r = log pi(y|x) - log pi_ref(y|x), summed over answer tokens.

    The reference is the policy of step 0, whatever the stack: adapters switched off where they start as identity, the
    remembered trained tensors otherwise; its log-probabilities are computed once a row. `length_norm` divides each r by its
    answer's length. At step 0 the loss is log 2 (0.6931) for any beta.

    Paper: Direct Preference Optimization (arXiv 2305.18290); robust: arXiv 2403.00409. Label smoothing follows the
    conservative-DPO formula, which the reference trainer does not apply to its `sigmoid` loss.
    """

    rows: ClassVar[str] = "preference"
    head: ClassVar[str] = "causal"
    roles: ClassVar[tuple[str, ...]] = ("reference",)
    dropout: ClassVar[bool] = False

    beta: PositiveFloat = 0.1
    """Strength of the leash to the reference."""
    loss_type: Literal["sigmoid", "robust", "hinge"] = "sigmoid"
    """Shape of the loss over beta times the reward difference."""
    label_smoothing: OpenFraction = 0.0
    """Assumed share of flipped labels (below 0.5 for `robust`)."""
    length_norm: bool = False
    """Divide each log-ratio by its answer's number of tokens."""
    nll_coef: NonNegativeFloat = 0.0
    """Weight of the token-mean negative log-likelihood of the chosen answer."""

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Pairs that share their prompt."""
        return collate_pairs(rows, roles)

    def weight(self, batch: Batch) -> float:
        """Pairs."""
        return float(pair_count(batch))

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Summed loss of the pairs; the reference is asked before the policy."""
        with torch.no_grad():
            reference_chosen, reference_rejected = reference_scores(batch, roles)
        scores = policy_scores(batch, roles)
        r_w, r_l = scores.chosen - reference_chosen, scores.rejected - reference_rejected
        rewards = reward_metrics(self.beta * r_w, self.beta * r_l)
        if self.length_norm:
            r_w, r_l = r_w / scores.chosen_tokens, r_l / scores.rejected_tokens
        h = self.beta * (r_w - r_l)
        total = dpo_loss(h, self.loss_type, self.label_smoothing).sum()
        count = float(h.shape[0])
        metrics = {
            **rewards,
            "logps/chosen": (scores.chosen.detach().sum(), count),
            "logps/rejected": (scores.rejected.detach().sum(), count),
        }
        if self.nll_coef:
            nll = -(scores.chosen / scores.chosen_tokens).sum()
            total = total + self.nll_coef * nll
            metrics["nll"] = (nll.detach(), count)
        return Loss(total, metrics)
