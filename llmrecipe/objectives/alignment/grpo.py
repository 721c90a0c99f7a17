"""Group relative policy optimisation: several answers to a prompt are compared with each other, without a value model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Field, Literal, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, StopText
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.alignment._engines.advantages import clipped_policy_loss, clipped_share, group_relative
from llmrecipe.objectives.alignment._engines.by_answer import answer_count, sum_by_answer
from llmrecipe.objectives.alignment._engines.kl import kl_estimate
from llmrecipe.objectives.alignment._engines.rollout import RolloutPlan, Sample, by_prompt, scores_of
from llmrecipe.objectives.alignment._engines.rollout_metrics import ratio_metrics, rollout_metrics, with_metrics, with_old
from llmrecipe.objectives.alignment._engines.sampled import Sampled
from llmrecipe.objectives.base import Loss, Objective

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.recipe.schema import Recipe


@register
class Grpo(Sampled, Objective):
    """GRPO: an answer's advantage is its score against the other answers to the same prompt (arXiv 2402.03300).

        A_i = (s_i - mean_j s_j) / (std_j s_j + 1e-4)
        loss = mean over tokens of max(-A rho, -A clip(rho, 1 - e_low, 1 + e_high)) + beta KL(pi || pi_ref)

    `loss_type` says what the mean is taken over (DAPO, arXiv 2503.14476; Dr. GRPO, arXiv 2503.20783), `ratio: sequence` gives
    one ratio per answer (GSPO, arXiv 2507.18071). One batch of prompts is one rollout; `steps` counts its updates.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1",)
    unsharded: ClassVar[str] = (
        "each process samples answers of its own, of lengths of their own, while parameters are gathered by all at once"
    )
    rows: ClassVar[str] = "prompt"
    roles: ClassVar[tuple[str, ...]] = ("reference", "reward")
    dropout: ClassVar[bool] = False
    samples: ClassVar[bool] = True

    reward: dict[str, Any] = Field(default_factory=dict)
    """name -> {kind, weight, options}: the rewards of an answer, summed with their weights."""
    answers: PositiveInt = 8
    """Answers sampled for each prompt."""
    temperature: PositiveFloat = 1.0
    """Divides the logits when sampling, and in every log-probability."""
    max_new_tokens: PositiveInt = 64
    """Maximum number of tokens of an answer."""
    stop: list[StopText] = Field(default_factory=list)
    """Texts before which an answer ends; its tokens up to the end of one are trained, its text has none."""
    beta: NonNegativeFloat = 0.04
    """Weight of the divergence from the policy of step 0; 0 needs no reference."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """Estimate of the divergence in the loss (see `alignment.kl`)."""
    kl_correction: bool = True
    """Weight the divergence by the ratio, so that its gradient is that of KL on older answers too (arXiv 2512.02556)."""
    epochs: PositiveInt = 1
    """Passes over each rollout."""
    minibatches: PositiveInt = 1
    """Optimizer steps per pass."""
    clip: NonNegativeFloat = 0.2
    """How far below 1 the ratio still has a gradient."""
    clip_high: NonNegativeFloat | None = None
    """How far above 1; the same as `clip` where not given."""
    scale: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation divides the advantages."""
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """Mean over all tokens; over answers of their token means; or token sums over answers times `max_new_tokens`."""
    ratio: Literal["token", "sequence"] = "token"
    """A ratio for each token, or one per answer, the exponential of its mean log-ratio."""
    missing_end: float | None = None
    """Score of an answer that reached `max_new_tokens` without an end; null keeps its own score."""
    eval_temperature: NonNegativeFloat | None = None
    """Temperature of the answers to held-out prompts; null takes `temperature`, 0 is greedy."""
    generation_batch: PositiveInt = 64
    """Answers generated at once."""
    show: NonNegativeInt = 2
    """Answers of each rollout written to the events, with their scores."""

    def plan(self, **own: object) -> RolloutPlan:
        """Return the rollout plan: several answers to each prompt."""
        return super().plan(answers=self.answers, old_in_advantages=False, **own)

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse groups of fewer than two answers, and rows that the rewards cannot score.

        Raises:
            RecipeError: naming the key to change.
        """
        if self.answers < 2:
            raise RecipeError("objective.answers: a group of one answer has no advantage; give at least 2")
        super().check(recipe, data)

    def advantages(self, samples: list[Sample], roles: Roles) -> None:
        """Give every token of an answer the answer's advantage."""
        scores = by_prompt(samples, scores_of(samples), self.answers)
        found = group_relative(scores, self.scale, total=roles.sum)[~scores.isnan()].float()
        for sample, value in zip(samples, found, strict=True):
            sample.tokens["advantages"] = value.expand(sample.length)

    def weight(self, batch: Batch) -> float:
        """Return the number of tokens or answers, depending on `loss_type`: the loss denominator."""
        return float(batch.target.numel()) if self.loss_type == "dapo" else float(answer_count(batch))

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed clipped surrogate, plus the divergence."""
        out = roles.policy(batch, entropy=True, temperature=self.temperature)
        logprobs = out["logprobs"]
        batch = with_old(batch, logprobs)
        extra = batch.extra
        log_ratio = logprobs - extra["old"]
        advantages = extra["advantages"]
        measured = log_ratio
        if self.ratio == "sequence":
            measured = sum_by_answer(batch, log_ratio) / extra["length"]
            log_ratio = measured[extra["answer"]]
        high = self.clip if self.clip_high is None else self.clip_high
        ratio = log_ratio.exp()
        losses, corrected = self.corrected(clipped_policy_loss(ratio, advantages, self.clip, high), batch)
        if self.beta:
            kl = kl_estimate(logprobs, extra["reference"], self.kl_estimator)
            losses = losses + self.beta * (kl * ratio if self.kl_correction else kl)
        clipped = clipped_share(ratio.detach(), advantages, self.clip, high)
        return with_metrics(
            self.reduce(losses, batch),
            rollout_metrics(batch, self.beta),
            ratio_metrics(measured, clipped, out["entropy"]),
            corrected,
        )

    def reduce(self, losses: Tensor, batch: Batch) -> Tensor:
        """Sum the token losses, (N,), weighted as `loss_type` says, to a scalar."""
        if self.loss_type == "grpo":
            return (losses / batch.extra["length"][batch.extra["answer"]]).sum()
        return losses.sum() / (self.max_new_tokens if self.loss_type == "dr_grpo" else 1)
