"""Group relative policy optimisation: several answers to a prompt are judged against each other, without a value model."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Field, Literal, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.alignment._engines.advantages import clipped_policy_loss, clipped_share, group_relative
from llmrecipe.objectives.alignment._engines.kl import kl_estimate
from llmrecipe.objectives.alignment._engines.rollout import (
    Plan,
    Sample,
    answer_count,
    ratio_metrics,
    rollout_metrics,
    score_groups,
    sum_by_answer,
    with_metrics,
)
from llmrecipe.objectives.alignment._engines.sampled import Sampled
from llmrecipe.objectives.base import Loss, Objective


@register
class Grpo(Sampled, Objective):
    """GRPO: an answer's advantage is its score against the other answers to the same prompt (arXiv 2402.03300).

        A_i = (s_i - mean_j s_j) / (std_j s_j + 1e-4)
        loss = mean over tokens of max(-A rho, -A clip(rho, 1 - e_low, 1 + e_high)) + beta KL(pi || pi_ref)

    `loss_type` says what the mean is taken over (DAPO, arXiv 2503.14476; Dr. GRPO, arXiv 2503.20783), `ratio: sequence` gives
    one ratio an answer (GSPO, arXiv 2507.18071). One batch of prompts is one rollout; `steps` counts its updates.
    """

    rows: ClassVar[str] = "prompt"
    roles: ClassVar[tuple[str, ...]] = ("reference", "reward")
    dropout: ClassVar[bool] = False
    samples: ClassVar[bool] = True

    reward: dict[str, Any] = Field(default_factory=dict)
    """name -> {kind, weight, options}: what an answer is worth, a weighted sum."""
    answers: PositiveInt = 8
    """Answers sampled to each prompt."""
    temperature: PositiveFloat = 1.0
    """Divides the logits when sampling, and in every log-probability."""
    max_new_tokens: PositiveInt = 64
    """Longest answer."""
    beta: NonNegativeFloat = 0.04
    """Weight of the divergence from the policy of step 0; 0 asks for no reference."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """Estimate of the divergence in the loss (see `alignment.kl`)."""
    kl_correction: bool = True
    """Weigh the divergence by the ratio, so that its gradient is that of KL also on older answers (arXiv 2512.02556)."""
    epochs: PositiveInt = 1
    """Passes over each rollout."""
    minibatches: PositiveInt = 1
    """Optimizer steps a pass."""
    clip: NonNegativeFloat = 0.2
    """How far below 1 the ratio still has a gradient."""
    clip_high: NonNegativeFloat | None = None
    """How far above 1; the same as `clip` where not given."""
    scale: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation divides the advantages."""
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """Mean over all tokens; over answers of their token means; or token sums over answers times `max_new_tokens`."""
    ratio: Literal["token", "sequence"] = "token"
    """A ratio for each token, or one an answer, exp of its mean log-ratio."""
    missing_end: float | None = None
    """Score of an answer that reached `max_new_tokens` without an end; null keeps its own score."""
    eval_temperature: NonNegativeFloat | None = None
    """Temperature of the answers to held-out prompts; null takes `temperature`, 0 is greedy."""
    generation_batch: PositiveInt = 64
    """Answers generated at once."""
    show: NonNegativeInt = 2
    """Answers of each rollout written to the events, with their scores."""

    def plan(self, **own: Any) -> Plan:
        """Several answers to a prompt."""
        return super().plan(answers=self.answers, **own)

    def check(self, recipe: Any, data: Any) -> None:
        """Groups of at least two answers, and rewards that the rows can be scored with.

        Raises:
            RecipeError: naming the key to change.
        """
        if self.answers < 2:
            raise RecipeError("objective.answers: a group of one answer has no advantage; give at least 2")
        super().check(recipe, data)

    def advantages(self, samples: list[Sample], roles: Roles) -> None:
        """Give every token of an answer the answer's advantage."""
        scores = score_groups(samples, self.answers)
        found = group_relative(scores, self.scale, total=roles.sum).flatten().float()
        for sample, value in zip(samples, found, strict=True):
            sample.tokens["advantages"] = value.expand(sample.length)

    def weight(self, batch: Batch) -> float:
        """Tokens or answers, by `loss_type`."""
        return float(batch.target.numel()) if self.loss_type == "dapo" else float(answer_count(batch))

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Summed clipped surrogate, plus the divergence."""
        out = roles.policy(batch, entropy=True, temperature=self.temperature)
        t, extra = out["logprobs"], batch.extra
        log_ratio = t - extra["old"]
        advantages = extra["advantages"]
        measured = log_ratio
        if self.ratio == "sequence":
            measured = sum_by_answer(batch, log_ratio) / extra["length"]
            log_ratio = measured[extra["answer"]]
        high = self.clip if self.clip_high is None else self.clip_high
        ratio = log_ratio.exp()
        each = clipped_policy_loss(ratio, advantages, self.clip, high)
        if self.beta:
            kl = kl_estimate(t, extra["reference"], self.kl_estimator)
            each = each + self.beta * (kl * ratio if self.kl_correction else kl)
        clipped = clipped_share(ratio.detach(), advantages, self.clip, high)
        return with_metrics(
            self.reduce(each, batch), rollout_metrics(batch, self.beta), ratio_metrics(measured, clipped, out["entropy"])
        )

    def reduce(self, each: Tensor, batch: Batch) -> Tensor:
        """(N,) token losses -> their sum, weighted as `loss_type` says."""
        if self.loss_type == "grpo":
            return (each / batch.extra["length"][batch.extra["answer"]]).sum()
        return each.sum() / (self.max_new_tokens if self.loss_type == "dr_grpo" else 1)
