"""REINFORCE with a leave-one-out baseline: whole answers as actions, the other answers as the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import Field, Literal, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, StopText
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.alignment._engines.advantages import clipped_policy_loss, clipped_share, leave_one_out, moments
from llmrecipe.objectives.alignment._engines.by_answer import answer_count, sum_by_answer
from llmrecipe.objectives.alignment._engines.rollout import RolloutPlan, Sample, by_prompt, scores_of
from llmrecipe.objectives.alignment._engines.rollout_metrics import ratio_metrics, rollout_metrics, with_metrics, with_old
from llmrecipe.objectives.alignment._engines.sampled import Sampled
from llmrecipe.objectives.base import Loss, Objective

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.recipe.schema import Recipe


@register
class Rloo(Sampled, Objective):
    """RLOO: an answer's advantage is its reward minus the mean reward of the other answers (arXiv 2402.14740).

        R_i = s_i - beta sum_t (log pi - log pi_ref)          A_i = R_i - mean_{j != i} R_j
        loss = mean over answers of max(-A rho, -A clip(rho, 1 - e, 1 + e)),   rho = pi(y|x) / pi_old(y|x)

    The divergence is part of the reward, and one ratio stands for the whole answer. One batch of prompts is one rollout;
    `steps` counts its updates.
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
    answers: PositiveInt = 4
    """Answers sampled for each prompt."""
    temperature: PositiveFloat = 1.0
    """Divides the logits when sampling, and in every log-probability."""
    max_new_tokens: PositiveInt = 64
    """Maximum number of tokens of an answer."""
    stop: list[StopText] = Field(default_factory=list)
    """Texts before which an answer ends; its tokens up to the end of one are trained, its text has none."""
    beta: NonNegativeFloat = 0.05
    """Weight of the divergence from the policy of step 0; 0 needs no reference."""
    epochs: PositiveInt = 1
    """Passes over each rollout."""
    minibatches: PositiveInt = 1
    """Optimizer steps per pass."""
    clip: NonNegativeFloat = 0.2
    """How far from 1 the ratio still has a gradient."""
    normalise: bool = False
    """Subtract the mean of all advantages and divide by their standard deviation."""
    sampler_correction: Literal["none", "sequence"] = "none"
    """Weight the surrogate by min(pi_old / pi_sampler, `sampler_cap`) of the whole answer: for a sampler whose
    log-probabilities differ from those of training."""
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
        return super().plan(
            answers=self.answers, token_names=(), number_names=("advantages",), old_in_advantages=self.beta > 0, **own
        )

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse groups of fewer than two answers, and rows that the rewards cannot score.

        Raises:
            RecipeError: naming the key to change.
        """
        if self.answers < 2:
            raise RecipeError("objective.answers: one answer has no others to be compared with; give at least 2")
        super().check(recipe, data)

    def advantages(self, samples: list[Sample], roles: Roles) -> None:
        """Give every answer its advantage."""
        rewards = scores = by_prompt(samples, scores_of(samples), self.answers)
        if self.beta:
            rewards = scores - self.beta * by_prompt(samples, [s.numbers["kl"] for s in samples], self.answers)
        found = leave_one_out(rewards)[~scores.isnan()]
        if self.normalise:
            mean, variance = moments(found, roles.sum)
            found = (found - mean) / (variance**0.5 + 1e-4)
        for sample, value in zip(samples, found.tolist(), strict=True):
            sample.numbers["advantages"] = value

    def weight(self, batch: Batch) -> float:
        """Return the number of answers, the loss denominator."""
        return float(answer_count(batch))

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed clipped surrogate of the answers."""
        out = roles.policy(batch, entropy=True, temperature=self.temperature)
        batch = with_old(batch, out["logprobs"])
        log_ratio = sum_by_answer(batch, out["logprobs"] - batch.extra["old"])
        advantages = batch.extra["advantages"]
        losses, corrected = self.corrected(clipped_policy_loss(log_ratio.exp(), advantages, self.clip, self.clip), batch)
        clipped = clipped_share(log_ratio.detach().exp(), advantages, self.clip, self.clip)
        moved = ratio_metrics(log_ratio, clipped, out["entropy"])
        return with_metrics(losses.sum(), rollout_metrics(batch, self.beta), moved, corrected)
