"""Direct preference optimisation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Literal, NonNegativeFloat, OpenFraction, PositiveFloat, RefSync
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.alignment._engines.pairs import (
    PAIR_METRICS,
    answer_nll,
    collate_pairs,
    log_ratios,
    logp_metrics,
    pair_count,
    pairs_per_token,
    refuse_soft,
    reward_metrics,
    share_tokens,
)
from llmrecipe.objectives.alignment._engines.references import check_reference, follow
from llmrecipe.objectives.base import Loss, Measures, Objective

SEPARATE = ("nca", "apo_zero", "apo_down", "sppo")
"""Losses that look at each answer's reward, not only at their difference."""


def dpo_loss(h: Tensor, loss_type: str = "sigmoid", smoothing: float = 0.0, p: Tensor | float = 1.0) -> Tensor:
    """Loss of each pair from h = beta (r_w - r_l), (P,).

    sigmoid  -q log sigma(h) - (1 - q) log sigma(-h),   q = (1 - e) p + e (1 - p)      (p = 1 and e = 0: DPO)
    robust   [-(1 - e) log sigma(h) + e log sigma(-h)] / (1 - 2e)
    hinge    relu(1 - h)
    exo      sigma(h) [log sigma(h) - log(1 - e)] + sigma(-h) [log sigma(-h) - log e]

    with p the probability that the chosen answer is the better one, which only `sigmoid` reads.
    """
    if loss_type == "hinge":
        return F.relu(1.0 - h)
    if loss_type == "robust":
        return (-(1.0 - smoothing) * F.logsigmoid(h) + smoothing * F.logsigmoid(-h)) / (1.0 - 2.0 * smoothing)
    if loss_type == "exo":
        log_w, log_l = F.logsigmoid(h), F.logsigmoid(-h)
        return log_w.exp() * (log_w - math.log1p(-smoothing)) + log_l.exp() * (log_l - math.log(smoothing))
    q = (1.0 - smoothing) * p + smoothing * (1.0 - p)
    return -q * F.logsigmoid(h) - (1.0 - q) * F.logsigmoid(-h)


def separate_loss(r_w: Tensor, r_l: Tensor, beta: float, loss_type: str) -> Tensor:
    """Loss of each pair from both log-ratios, (P,), with a = beta r_w and b = beta r_l.

    nca       -log sigma(a) - log sigma(-a) / 2 - log sigma(-b) / 2
    apo_zero  1 - sigma(a) + sigma(b)
    apo_down  sigma(a) + 1 - sigma(a - b)
    sppo      (r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2
    """
    a, b = beta * r_w, beta * r_l
    if loss_type == "nca":
        return -F.logsigmoid(a) - 0.5 * F.logsigmoid(-a) - 0.5 * F.logsigmoid(-b)
    if loss_type == "apo_zero":
        return 1.0 - torch.sigmoid(a) + torch.sigmoid(b)
    if loss_type == "apo_down":
        return torch.sigmoid(a) + 1.0 - torch.sigmoid(a - b)
    return (r_w - 0.5 / beta) ** 2 + (r_l + 0.5 / beta) ** 2


@register
class Dpo(Objective):
    """DPO: L = -(1/P) sum log sigma(beta (r_w - r_l)), r = log pi(y|x) - log pi_ref(y|x), summed over answer tokens.

    The reference is the policy of step 0, whatever the stack: adapters switched off where they start as identity, the
    remembered trained tensors otherwise; its log-probabilities are computed once a row. `reference: base` is the model
    without any stack, also without those of the run it continues; `none` drops the reference; a folder is another model or
    finished run, whose scores are taken before the policy is loaded. With `ref_sync` the reference follows the policy:
    pi_ref <- alpha pi + (1 - alpha) pi_ref every `steps` updates, over the weights. `length_norm` divides each r by its
    answer's length. At step 0 the loss is log 2 (0.6931) for any beta. A row's `p` is the probability that its chosen answer
    is the better one (soft labels of `label_ai`; 1 where a row has none): `sigmoid` then is -p log sigma(h) - (1 - p)
    log sigma(-h), conservative DPO with an e of the row's own; other losses refuse such rows.

    `logprob_gap` minimises -(S_w - S_l), S = log pi(y|x): no reference, no beta and no lower bound, so it wants a small
    learning rate, `optim.clip` and `nll_coef`.

    Papers: DPO (arXiv 2305.18290); ref_sync: TR-DPO (arXiv 2404.09656); robust: arXiv 2403.00409; exo: arXiv 2402.00856;
    nca: arXiv 2402.05369; apo_zero and apo_down: arXiv 2408.06266; sppo: arXiv 2405.00675. Label smoothing of `sigmoid`
    follows the conservative-DPO formula, which the reference trainer does not apply to its `sigmoid` loss.
    """

    rows: ClassVar[str] = "preference"
    head: ClassVar[str] = "causal"
    roles: ClassVar[tuple[str, ...]] = ("reference",)
    dropout: ClassVar[bool] = False

    beta: PositiveFloat = 0.1
    """Strength of the leash to the reference."""
    loss_type: Literal["sigmoid", "robust", "hinge", "exo", "nca", "apo_zero", "apo_down", "sppo", "logprob_gap"] = "sigmoid"
    """Shape of the loss over the rewards."""
    label_smoothing: OpenFraction = 0.0
    """Assumed share of flipped labels (below 0.5 for `robust`, above 0 for `exo`)."""
    length_norm: bool = False
    """Divide each log-ratio by its answer's number of tokens."""
    reference: Literal["initial", "base", "none"] | str = "initial"
    """The policy of step 0, the model without any stack, no reference at all, or the folder of a model or finished run."""
    ref_sync: RefSync | None = None
    """{alpha, steps}: the reference follows the policy (TR-DPO); for stacks that train the base's own weights."""
    nll_coef: NonNegativeFloat = 0.0
    """Weight of the token-mean negative log-likelihood of the chosen answers."""

    def check(self, recipe: Any, data: Any) -> None:
        """Refuse a label smoothing the loss is not defined for, and references that cannot be.

        Raises:
            RecipeError: naming the key and what is allowed.
            DataError: rows with soft labels under a loss that has no place for them.
        """
        check_reference(recipe, self.reference_of(), self.ref_sync)
        if self.loss_type == "robust" and self.label_smoothing >= 0.5:
            raise RecipeError(
                f"objective.label_smoothing: robust divides by 1 - 2e; got {self.label_smoothing}, allowed [0, 0.5)"
            )
        if self.loss_type == "exo" and self.label_smoothing == 0.0:
            raise RecipeError("objective.label_smoothing: exo takes its logarithm, so it must be above 0, for example 0.001")
        if self.hard_only is not None:
            refuse_soft(data, self.hard_only)

    @property
    def hard_only(self) -> str | None:
        """What has no place for soft labels; None for the loss that reads them."""
        return None if self.loss_type == "sigmoid" else f"objective.loss_type={self.loss_type}"

    def reference_of(self) -> str:
        """The `reference` option; `logprob_gap` has none."""
        return "none" if self.loss_type == "logprob_gap" else self.reference

    def reference_moves(self) -> bool:
        """With `ref_sync`."""
        return self.ref_sync is not None

    def after_step(self, step: int, metrics: dict[str, float], roles: Roles) -> None:
        """The reference moves towards the policy when it is time."""
        follow(self.ref_sync, step, roles)

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Pairs that share their prompt."""
        return collate_pairs(rows, roles, soft=self.hard_only)

    def batches(self, source: Iterable[list[dict[str, Any]]], roles: Roles) -> Iterator[list[Batch]]:
        """Micro-batches that know how many tokens the whole step has, where the likelihood's token mean needs it."""
        for rows in source:
            micros = [self.collate(part, roles) for part in roles.split(rows)]
            yield share_tokens(micros, roles) if self.nll_coef else micros

    def measures(self) -> Measures:
        """Those of both answers, the drift from the reference, and the likelihood where it is part of the loss."""
        return {**PAIR_METRICS, "kl": None, **({"nll": "min"} if self.nll_coef else {})}

    def weight(self, batch: Batch) -> float:
        """Pairs."""
        return float(pair_count(batch))

    def step_zero(self) -> dict[str, float]:
        """The loss at h = 0, and margins of 0."""
        wanted = {"rewards/margins": 0.0, "kl": 0.0}
        if not self.nll_coef:
            wanted["loss"] = float(self.pair_losses(torch.zeros(1), torch.zeros(1)))
        return wanted

    def pair_losses(self, r_w: Tensor, r_l: Tensor, p: Tensor | float = 1.0) -> Tensor:
        """(P,) losses from the log-ratios of both answers and their soft labels."""
        if self.loss_type == "logprob_gap":
            return r_l - r_w
        if self.loss_type in SEPARATE:
            return separate_loss(r_w, r_l, self.beta, self.loss_type)
        return dpo_loss(self.beta * (r_w - r_l), self.loss_type, self.label_smoothing, p)

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Summed loss of the pairs."""
        total, nll, metrics = self._parts(batch, roles)
        if self.nll_coef:
            total = total + self.nll_coef * pairs_per_token(batch) * nll
        return Loss(total, metrics)

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """The loss without the likelihood term, which is a mean over all tokens of the split (see `finish_evaluation`)."""
        total, _, metrics = self._parts(batch, roles)
        return {"loss": (total, self.weight(batch)), **metrics}

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, Tensor]) -> dict[str, float]:
        """The whole loss of the split."""
        return {"loss": sums["loss"] + self.nll_coef * sums["nll"]} if self.nll_coef else {}

    def _parts(self, batch: Batch, roles: Roles) -> tuple[Tensor, Tensor, dict[str, tuple[Any, float]]]:
        scores, r_w, r_l, t = log_ratios(batch, roles, self.reference_of())
        metrics = {**reward_metrics(self.beta * r_w, self.beta * r_l), **logp_metrics(scores)}
        # The chosen answers are not the policy's own samples, so this is a proxy of its divergence from the reference.
        metrics["kl"] = (r_w.detach().sum(), float(r_w.shape[0]))
        nll, tokens = answer_nll(batch, t)
        if self.nll_coef:
            metrics["nll"] = (nll.detach(), tokens)
        if self.length_norm:
            r_w, r_l = r_w / scores.chosen_tokens, r_l / scores.rejected_tokens
        return self.pair_losses(r_w, r_l, batch.extra.get("p", 1.0)).sum(), nll, metrics
