"""Reinforcement learning from a reward: proximal policy optimisation with a value function and a divergence penalty."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.option_types import (
    Field,
    Fraction,
    Literal,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StopText,
)
from llmrecipe.core.registry import register
from llmrecipe.data.collate import Batch
from llmrecipe.engine.forward import Critic
from llmrecipe.engine.role_models import Roles
from llmrecipe.methods._base.method import Stage
from llmrecipe.methods.reparameterized.lora import Lora
from llmrecipe.models import task_heads
from llmrecipe.objectives.alignment._engines.advantages import (
    clipped_policy_loss,
    clipped_share,
    clipped_value_loss,
    clipped_values,
    gae,
    moments,
    whiten,
)
from llmrecipe.objectives.alignment._engines.kl import KlController, kl_estimate
from llmrecipe.objectives.alignment._engines.rollout import RolloutPlan, Sample, scores_of
from llmrecipe.objectives.alignment._engines.rollout_metrics import ratio_metrics, rollout_metrics, with_metrics
from llmrecipe.objectives.alignment._engines.sampled import Sampled
from llmrecipe.objectives.base import Loss, Objective

if TYPE_CHECKING:
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.models.pretrained import LanguageModel
    from llmrecipe.recipe.schema import Recipe


FACTS = ("explained_variance", "returns_std")
"""Facts of a whole rollout, the same for each of its answers."""
TOKENS = ("values", "advantages", "returns")
"""Names that PPO adds to the tokens of an answer."""
NUMBERS = ("value_end", "return_end", "extended", "beta", *FACTS)
"""Names that it adds to the answer."""


def shaped_rewards(kl: Tensor, score: float, beta: float, extended: bool) -> Tensor:
    """Compute r_t = -beta kl_t, plus the score at the last token, (n,), or in the slot after it where there is one, (n + 1,).

    Args:
        kl: (n,) per-token divergence of the answer.
    """
    rewards = -beta * kl
    if extended:
        return torch.cat([rewards, rewards.new_tensor([score])])
    rewards = rewards.clone()
    rewards[-1] += score
    return rewards


@register
class Ppo(Sampled, Objective):
    """PPO against a reward, with a value function and a divergence penalty (arXiv 1707.06347, 2203.02155).

        r_t = -beta (log pi_old - log pi_ref) + [t = end] score
        A, R = GAE(r, V; gamma, lam), A whitened over all tokens of the rollout
        loss = mean_t max(-A rho, -A clip(rho, 1 - e, 1 + e)) + value_coef mean_t max((V - R)^2, (clip(V) - R)^2) / 2
               - entropy_coef mean_t H(pi)

    Policy, value function and reference share one base: the value function has its own adapter and head (role `value`), the
    reference is the policy of step 0. One batch of prompts is one rollout; `steps` counts its updates. Details follow
    arXiv 2403.17031 (the whitening divides by n - 1).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1",)
    unsharded: ClassVar[str] = (
        "each process samples answers of its own, of lengths of their own, while parameters are gathered by all at once"
    )
    waits: ClassVar[str] = "with target_kl_stop, whether the policy has moved so far that the next update is not to be made"
    rows: ClassVar[str] = "prompt"
    roles: ClassVar[tuple[str, ...]] = ("reference", "reward", "value")
    dropout: ClassVar[bool] = False
    samples: ClassVar[bool] = True

    reward: dict[str, Any] = Field(default_factory=dict)
    """name -> {kind, weight, options}: the rewards of an answer, summed with their weights."""
    temperature: PositiveFloat = 0.7
    """Divides the logits when sampling, and in every log-probability."""
    max_new_tokens: PositiveInt = 64
    """Maximum number of tokens of an answer."""
    stop: list[StopText] = Field(default_factory=list)
    """Texts before which an answer ends; its tokens up to the end of one are trained, its text has none."""
    epochs: PositiveInt = 4
    """Passes over each rollout."""
    minibatches: PositiveInt = 1
    """Optimizer steps per pass."""
    beta: NonNegativeFloat = 0.05
    """Weight of the divergence from the policy of step 0, at the start where `kl_target` is given."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether the divergence is part of the reward or of the loss."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimate of the divergence; the gradient of k1 is zero on average, so a loss needs k2 or k3."""
    kl_target: PositiveFloat | None = None
    """Divergence of a whole answer that beta is steered towards; null keeps beta fixed."""
    kl_horizon: PositiveFloat = 10000.0
    """Answers after which beta may have changed by a fifth."""
    gamma: Fraction = 1.0
    """Discount."""
    lam: Fraction = 0.95
    """Decay of generalised advantage estimation."""
    clip: NonNegativeFloat = 0.2
    """How far from 1 the ratio still has a gradient."""
    value_clip: PositiveFloat | None = 0.2
    """How far a value may move from the rollout's; null does not clip."""
    value_coef: NonNegativeFloat = 0.1
    """Weight of the value loss."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy that is rewarded."""
    target_kl_stop: PositiveFloat | None = None
    """Skip the rest of a rollout's updates after one whose `policy/approxkl` is above this."""
    value: Literal["auto", "adapter", "shared", "head"] = "auto"
    """A separate adapter on the frozen base; or a head on the policy's hidden states, with gradient (`shared`) or without
    (`head`). `auto` takes the adapter where the stack leaves the base frozen, `shared` elsewhere."""
    value_rank: PositiveInt = 8
    """Rank of the value function's adapter."""
    value_target: str = "attn.q|v"
    """Sites of the value function's adapter."""
    score_at: Literal["last", "after_eos"] = "last"
    """The token that earns the score: the last one, or the slot after the end where the answer leaves room for one."""
    score_norm: bool = False
    """Shift and scale the scores of each rollout to mean 0 and standard deviation 1, before they are clipped."""
    score_clip: PositiveFloat | None = None
    """Clip scores to [-c, c]."""
    missing_end: float | None = -1.0
    """Score of an answer that reached `max_new_tokens` without an end; null keeps its own score."""
    whiten_rewards: bool = False
    """Divide the shaped rewards by their standard deviation, keeping their mean."""
    eval_temperature: NonNegativeFloat | None = None
    """Temperature of the answers to held-out prompts; null takes `temperature`, 0 is greedy."""
    generation_batch: PositiveInt = 64
    """Answers generated at once."""
    show: NonNegativeInt = 2
    """Answers of each rollout written to the events, with their scores."""

    def plan(self, **own: object) -> RolloutPlan:
        """Return the rollout plan: one answer to each prompt, always with its divergence, values, advantages and returns."""
        return super().plan(reference=True, token_names=TOKENS, number_names=NUMBERS, critic=self.critic, **own)

    @functools.cached_property
    def controller(self) -> KlController:
        """Return the controller of beta."""
        return KlController(self.beta, self.kl_target, self.kl_horizon)

    # --- before the first step ------------------------------------------------------------------------------------

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse options that contradict each other, and rows that the rewards cannot score.

        Raises:
            RecipeError: naming the key to change.
        """
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise RecipeError(
                "objective.kl_estimator: the gradient of k1 is zero on average, so as a loss it does nothing; use k2 or k3"
            )
        super().check(recipe, data)

    def role_wrappers(self, stack: list[Any]) -> list[Any]:
        """Return the value function's adapter, where it has one.

        Raises:
            RecipeError: it would sit on a base that the policy trains.
        """
        frozen = any(w.stage is Stage.INJECT for w in stack) and not any(w.stage is Stage.SELECT for w in stack)
        if self.value == "adapter" and not frozen:
            raise RecipeError(
                "objective.value: a separate adapter needs a frozen base, and this stack trains the base's weights; "
                "use objective.value=shared or head, or a stack of injected methods such as lora"
            )
        if self.value not in ("auto", "adapter") or not frozen:
            return []
        options: dict[str, Any] = {"target": self.value_target, "r": self.value_rank, "alpha": 2.0 * self.value_rank}
        return [Lora(name="critic", role="value", **options)]

    def prepare_model(self, model: LanguageModel, seed: int) -> None:
        """Add the value head, initialised to zero."""
        task_heads.add_head(model, "value", std=0.0, seed=seed)

    def critic(self, roles: Roles) -> Critic:
        """Return where values are computed."""
        if any(w.role == "value" for w in roles.stack):
            return Critic("own", off=frozenset(w.name for w in roles.stack if not w.role))
        return Critic("detached" if self.value == "head" else "shared")

    # --- rollouts -------------------------------------------------------------------------------------------------

    def ready(self, micros: list[Batch], roles: Roles | None) -> list[Batch]:
        """Give each micro-batch its share of value slots."""
        return share_slots(micros, roles)

    def advantages(self, samples: list[Sample], roles: Roles) -> None:
        """Compute rewards, advantages and returns of a rollout; then adapt beta to its divergence."""
        lengths = torch.tensor([s.length for s in samples], dtype=torch.long)
        room = torch.tensor(
            [self.score_at == "after_eos" and s.length < self.max_new_tokens for s in samples], dtype=torch.bool
        )
        slots = lengths + room
        shape = (len(samples), int(slots.max()) if samples else 0)
        rewards, values = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        scores = self.scores_of(samples, roles)
        for i, s in enumerate(samples):
            rewards[i, : slots[i]] = self.rewards_of(s, scores[i], bool(room[i]))
            values[i, : s.length] = s.tokens["values"].double()
            if room[i]:
                values[i, s.length] = s.numbers["value_end"]
        real = torch.arange(shape[1])[None] < slots[:, None]
        if self.whiten_rewards:
            rewards[real] = whiten(rewards[real], roles.sum, shift=False)
        advantages, returns = gae(rewards, values, slots, self.gamma, self.lam)
        facts = {
            "explained_variance": explained_variance(values[real], returns[real], roles),
            "returns_std": moments(returns[real], roles.sum)[1] ** 0.5,
        }
        tokens = torch.arange(shape[1])[None] < lengths[:, None]
        advantages[tokens] = whiten(advantages[tokens], roles.sum)
        for i, s in enumerate(samples):
            s.tokens |= {"advantages": advantages[i, : s.length].float(), "returns": returns[i, : s.length].float()}
            end = float(returns[i, s.length]) if room[i] else 0.0
            s.numbers |= {"return_end": end, "extended": float(room[i]), "beta": self.controller.coef, **facts}
        if torch.is_grad_enabled():
            total, count = roles.sum([sum(s.numbers["kl"] for s in samples), float(len(samples))])
            self.controller.update(total / max(count, 1.0), int(count))

    def scores_of(self, samples: list[Sample], roles: Roles) -> list[float]:
        """Return the scores as they enter the rewards: normalised over the rollout, then clipped."""
        scores = torch.tensor(scores_of(samples), dtype=torch.float64)
        if self.score_norm:
            scores = whiten(scores, roles.sum)
        return scores.tolist() if self.score_clip is None else scores.clamp(-self.score_clip, self.score_clip).tolist()

    def rewards_of(self, sample: Sample, score: float, extended: bool) -> Tensor:
        """Compute the shaped rewards of one answer, (slots,)."""
        kl = kl_estimate(sample.tokens["old"].double(), sample.tokens["reference"].double(), self.kl_estimator)
        return shaped_rewards(kl, score, self.controller.coef if self.kl_in == "reward" else 0.0, extended)

    # --- the loss -------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed policy loss plus the value loss of the same tokens."""
        out = roles.policy(
            batch, entropy=True, temperature=self.temperature, critic=self.critic(roles), entropy_graph=self.entropy_coef > 0
        )
        logprobs, extra = out["logprobs"], batch.extra
        log_ratio, advantages = logprobs - extra["old"], extra["advantages"]
        policy, corrected = self.corrected(clipped_policy_loss(log_ratio.exp(), advantages, self.clip, self.clip), batch)
        if self.kl_in == "loss":
            policy = policy + extra["beta"][extra["answer"]] * kl_estimate(logprobs, extra["reference"], self.kl_estimator)
        value = clipped_value_loss(out["values"], extra["values"], extra["returns"], self.value_clip).sum()
        # A batch without answers holds one stand-in sequence.
        end = out["values_end"][: extra["extended"].numel()]
        value = (
            value
            + (extra["extended"] * clipped_value_loss(end, extra["value_end"], extra["return_end"], self.value_clip)).sum()
        )
        total = policy.sum() + self.value_coef * extra["slots"] * value
        if self.entropy_coef:
            total = total - self.entropy_coef * out["entropy"].sum()
        clipped = clipped_share(log_ratio.detach().exp(), advantages, self.clip, self.clip)
        own = {
            "policy/loss": (policy.detach().sum(), float(logprobs.numel())),
            "value/loss": (value.detach(), float(logprobs.numel()) + float(batch.here.extra["extended"].sum())),
            "value/clipfrac": (
                clipped_values(out["values"].detach(), extra["values"], extra["returns"], self.value_clip).sum(),
                float(logprobs.numel()),
            ),
            "value/returns": (extra["returns"].sum(), float(logprobs.numel())),
            **{f"value/{name}": (extra[name].sum(), float(extra["score"].numel())) for name in FACTS},
            "objective/kl_coef": (extra["beta"].sum(), float(extra["score"].numel())),
        }
        return with_metrics(
            total, rollout_metrics(batch, extra["beta"]), ratio_metrics(log_ratio, clipped, out["entropy"]), own, corrected
        )

    def after_step(self, step: int, metrics: Mapping[str, float], roles: Roles) -> None:
        """End a rollout whose policy has moved far enough."""
        if self.target_kl_stop is not None and metrics.get("policy/approxkl", 0.0) > self.target_kl_stop:
            self.live.stop()

    def state(self) -> dict[str, Any]:
        """Return the state of the rollouts and of beta."""
        return {**self.live.state(), "kl": self.controller.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the state, to continue after the last whole rollout."""
        self.live.load_state(state)
        self.controller.load_state(state["kl"])


def explained_variance(values: Tensor, returns: Tensor, roles: Roles) -> float:
    """Compute 1 - Var(R - V) / Var(R) over the slots, (N,), of all processes; 0 where the returns do not vary."""
    whole, left = moments(returns, roles.sum)[1], moments(returns - values, roles.sum)[1]
    return 1.0 - left / whole if whole > 0 else 0.0


def share_slots(micros: list[Batch], roles: Roles | None = None) -> list[Batch]:
    """Give each micro-batch the step's ratio of tokens to value slots, since both losses are divided by the tokens."""
    tokens = float(sum(m.target.numel() for m in micros))
    slots = tokens + sum(float(m.here.extra["extended"].sum()) for m in micros if "extended" in m.extra)
    if roles is not None:
        tokens, slots = roles.sum([tokens, slots])
    share = tokens / slots if slots else 1.0
    return [m.with_extra(slots=m.here.extra["score"].new_tensor(share)) for m in micros]
