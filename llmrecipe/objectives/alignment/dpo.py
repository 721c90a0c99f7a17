"""Direct preference optimisation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

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
    WithoutMargin,
    answer_nll,
    collate_pairs,
    implicit_reward_metrics,
    log_ratios,
    logp_metrics,
    pair_count,
    pairs_per_token,
    refuse_soft,
    share_tokens,
)
from llmrecipe.objectives.alignment._engines.references import check_reference, follow
from llmrecipe.objectives.base import Loss, Measures, Objective

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.recipe.schema import Recipe


SEPARATE = ("nca", "apo_zero", "apo_down", "sppo")
"""Losses that depend on each answer's reward, not only on the difference."""


def dpo_loss(h: Tensor, loss_type: str = "sigmoid", smoothing: float = 0.0, p: Tensor | float = 1.0) -> Tensor:
    """Compute the loss of each pair, (P,), from h = beta (r_chosen - r_rejected), (P,).

    sigmoid  -q log sigma(h) - (1 - q) log sigma(-h),   q = (1 - e) p + e (1 - p)      (p = 1 and e = 0: DPO)
    robust   [-(1 - e) log sigma(h) + e log sigma(-h)] / (1 - 2e)
    hinge    relu(1 - h)
    exo      sigma(h) [log sigma(h) - log(1 - e)] + sigma(-h) [log sigma(-h) - log e]

    with p the probability that the chosen answer is the better one, (P,) or a number, which only `sigmoid` reads.
    """
    if loss_type == "hinge":
        return F.relu(1.0 - h)
    if loss_type == "robust":
        return (-(1.0 - smoothing) * F.logsigmoid(h) + smoothing * F.logsigmoid(-h)) / (1.0 - 2.0 * smoothing)
    if loss_type == "exo":
        right, wrong = F.logsigmoid(h), F.logsigmoid(-h)
        return right.exp() * (right - math.log1p(-smoothing)) + wrong.exp() * (wrong - math.log(smoothing))
    q = (1.0 - smoothing) * p + smoothing * (1.0 - p)
    return -q * F.logsigmoid(h) - (1.0 - q) * F.logsigmoid(-h)


def separate_loss(chosen: Tensor, rejected: Tensor, beta: float, loss_type: str) -> Tensor:
    """Compute the loss of each pair, (P,), from both log-ratios, (P,) each, with a = beta chosen and b = beta rejected.

    nca       -log sigma(a) - log sigma(-a) / 2 - log sigma(-b) / 2
    apo_zero  1 - sigma(a) + sigma(b)
    apo_down  sigma(a) + 1 - sigma(a - b)
    sppo      (chosen - 1/(2 beta))^2 + (rejected + 1/(2 beta))^2
    """
    a, b = beta * chosen, beta * rejected
    if loss_type == "nca":
        return -F.logsigmoid(a) - 0.5 * F.logsigmoid(-a) - 0.5 * F.logsigmoid(-b)
    if loss_type == "apo_zero":
        return 1.0 - torch.sigmoid(a) + torch.sigmoid(b)
    if loss_type == "apo_down":
        return torch.sigmoid(a) + 1.0 - torch.sigmoid(a - b)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


@register
class Dpo(WithoutMargin, Objective):
    """DPO: L = -(1/P) sum log sigma(beta (r_w - r_l)), r = log pi(y|x) - log pi_ref(y|x), w the chosen answer, l the rejected.

    Log-probabilities are summed over answer tokens. The reference is the policy of step 0, whatever the stack: adapters are
    disabled where they start as the identity, and the initial trained tensors are kept otherwise; its log-probabilities are
    computed once for each row. `reference: base` is the model without any stack, not even those of the run it continues;
    `none` drops the reference; a folder is another model or finished run, whose scores are computed before the policy is
    loaded. With `ref_sync` the reference follows the policy:
    pi_ref <- alpha pi + (1 - alpha) pi_ref every `steps` updates, over the weights. `length_norm` divides each r by its
    answer's length. At step 0 the loss is log 2 (0.6931) for any beta. A row's `p` is the probability that its chosen answer
    is the better one (soft labels of `label_ai`; 1 where a row has none): `sigmoid` then is -p log sigma(h) - (1 - p)
    log sigma(-h), conservative DPO with an e for each row; other losses refuse such rows.

    `logprob_gap` minimises -(S_w - S_l), S = log pi(y|x): no reference, no beta and no lower bound, so it needs a small
    learning rate, `optim.clip` and `nll_coef`.

    Papers: DPO (arXiv 2305.18290); ref_sync: TR-DPO (arXiv 2404.09656); robust: arXiv 2403.00409; exo: arXiv 2402.00856;
    nca: arXiv 2402.05369; apo_zero and apo_down: arXiv 2408.06266; sppo: arXiv 2405.00675. Label smoothing of `sigmoid`
    follows the conservative-DPO formula, which the reference trainer does not apply to its `sigmoid` loss.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    rows: ClassVar[str] = "preference"
    head: ClassVar[str] = "causal"
    roles: ClassVar[tuple[str, ...]] = ("reference",)
    dropout: ClassVar[bool] = False

    beta: PositiveFloat = 0.1
    """Strength of the pull towards the reference."""
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

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse a label smoothing for which the loss is not defined, and invalid references.

        Raises:
            RecipeError: naming the key and what is allowed.
            DataError: rows with soft labels under a loss that does not support them.
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
        """Return the option that does not support soft labels; None for the loss that reads them."""
        return None if self.loss_type == "sigmoid" else f"objective.loss_type={self.loss_type}"

    def reference_of(self) -> str:
        """Return the `reference` option; `logprob_gap` has no reference."""
        return "none" if self.loss_type == "logprob_gap" else self.reference

    def reference_moves(self) -> bool:
        """Return whether the reference follows the policy: with `ref_sync` it does."""
        return self.ref_sync is not None

    def after_step(self, step: int, metrics: Mapping[str, float], roles: Roles) -> None:
        """Move the reference towards the policy every `ref_sync.steps` steps."""
        follow(self.ref_sync, step, roles)

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Lay out pairs that share their prompt."""
        return collate_pairs(rows, roles, soft=self.hard_only)

    def batches(self, source: Iterable[list[dict[str, Any]]], roles: Roles) -> Iterator[list[Batch]]:
        """Yield micro-batches, with the number of tokens of the whole step where the token mean of the likelihood needs it."""
        for rows in source:
            micros = [self.collate(part, roles) for part in roles.split(rows)]
            yield share_tokens(micros, roles) if self.nll_coef else micros

    def measures(self) -> Measures:
        """Return the metrics of both answers, the divergence from the reference, and the likelihood where it is in the loss."""
        return {**PAIR_METRICS, "kl": None, **({"nll": "min"} if self.nll_coef else {})}

    def weight(self, batch: Batch) -> float:
        """Return the number of pairs, the loss denominator."""
        return float(pair_count(batch))

    def step_zero(self) -> dict[str, float]:
        """Return the loss at h = 0, and margins of 0."""
        wanted = {"rewards/margins": 0.0, "kl": 0.0}
        if not self.nll_coef:
            wanted["loss"] = float(self.pair_losses(torch.zeros(1), torch.zeros(1)))
        return wanted

    def pair_losses(self, chosen: Tensor, rejected: Tensor, p: Tensor | float = 1.0) -> Tensor:
        """Compute the losses, (P,), from the log-ratios of both answers, (P,) each, and their soft labels, (P,) or a number."""
        if self.loss_type == "logprob_gap":
            return rejected - chosen
        if self.loss_type in SEPARATE:
            return separate_loss(chosen, rejected, self.beta, self.loss_type)
        return dpo_loss(self.beta * (chosen - rejected), self.loss_type, self.label_smoothing, p)

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed loss of the pairs."""
        total, nll, metrics = self._parts(batch, roles)
        if self.nll_coef:
            total = total + self.nll_coef * pairs_per_token(batch) * nll
        return Loss(total, metrics)

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Return the loss without the likelihood term, a mean over all tokens of the split (see `finish_evaluation`)."""
        total, _, metrics = self._parts(batch, roles)
        return {"loss": (total, self.weight(batch)), **metrics}

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, Tensor]) -> dict[str, float]:
        """Return the whole loss of the split, likelihood term included."""
        return {"loss": sums["loss"] + self.nll_coef * sums["nll"]} if self.nll_coef else {}

    def _parts(self, batch: Batch, roles: Roles) -> tuple[Tensor, Tensor, dict[str, tuple[Any, float]]]:
        scores, chosen, rejected, logprobs = log_ratios(batch, roles, self.reference_of())
        metrics = {**implicit_reward_metrics(self.beta * chosen, self.beta * rejected), **logp_metrics(scores)}
        # The chosen answers are not the policy's own samples, so this is a proxy of its divergence from the reference.
        metrics["kl"] = (chosen.detach().sum(), float(chosen.shape[0]))
        nll, tokens = answer_nll(batch, logprobs)
        if self.nll_coef:
            metrics["nll"] = (nll.detach(), tokens)
        if self.length_norm:
            chosen, rejected = chosen / scores.chosen_tokens, rejected / scores.rejected_tokens
        return self.pair_losses(chosen, rejected, batch.extra.get("p", 1.0)).sum(), nll, metrics
