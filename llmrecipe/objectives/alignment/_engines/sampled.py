"""Code shared by objectives that learn from the policy's own answers: prompts, rollouts, rewards and resume."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.errors import RecipeError
from llmrecipe.core.http_client import check_address
from llmrecipe.core.option_types import Literal, PositiveFloat
from llmrecipe.core.registry import options
from llmrecipe.objectives.alignment._engines.policy_server import PolicyServer
from llmrecipe.objectives.alignment._engines.rollout import RolloutPlan, Rollouts, Sample, check_rewards, held_out
from llmrecipe.objectives.alignment._engines.rollout_metrics import HELD_OUT_METRICS, held_out_metrics
from llmrecipe.objectives.alignment._engines.sampler_mismatch import sampler_weights, weight_metrics
from llmrecipe.objectives.base import Measures

if TYPE_CHECKING:
    from torch import Tensor

    from llmrecipe.data.collate import Batch
    from llmrecipe.data.prepare import Rows, SplitRows
    from llmrecipe.engine.role_models import Roles
    from llmrecipe.recipe.schema import ModelSection, Recipe
    from llmrecipe.runs.open_model import LoadedModel

SERVED = ("lora", "lora_fa", "adalora", "dylora")
"""Wrappers whose change of the base a server takes as an adapter."""
BASES = ("nf4", "int8")
"""Wrappers that only store the base in another way, which the server does by itself."""


@options
class Sampled:
    """Mixin for an `Objective` whose rows are prompts; it defines its own options, `plan`, `advantages` and `loss`."""

    headline: ClassVar[tuple[str, ...]] = ("objective/scores", "objective/kl", "response/length", "score", "kl")

    if TYPE_CHECKING:
        reward: dict[str, Any]
        temperature: float
        max_new_tokens: int
        stop: list[str]
        epochs: int
        minibatches: int
        beta: float
        missing_end: float | None
        eval_temperature: float | None
        generation_batch: int
        show: int

    sampler: str = ""
    """Address of a vLLM server up to and without /completions, which samples the answers that are trained on; it gets the
    policy's adapter before each rollout. Empty samples with the model that trains."""
    sampler_key_env: str | None = None
    """Environment variable with the server's key."""
    sampler_correction: Literal["none", "token", "sequence"] = "none"
    """Weight the surrogate by min(pi_old / pi_sampler, `sampler_cap`), of each token or of the whole answer: for a sampler
    whose log-probabilities differ from those of training."""
    sampler_cap: PositiveFloat = 2.0
    """Largest of these weights."""

    def plan(self, **own: object) -> RolloutPlan:
        """Return how rollouts are sampled: the options, and the settings of this objective alone."""
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "stop": tuple(self.stop),
            "epochs": self.epochs,
            "minibatches": self.minibatches,
            "reference": self.beta > 0,
            "missing_end": self.missing_end,
            "held_out_temperature": self.eval_temperature,
            "generation_batch": self.generation_batch,
            "show": self.show,
        }
        return RolloutPlan(**{**options, **own})

    @functools.cached_property
    def live(self) -> Rollouts:
        """Hold the running state of the rollouts."""
        return Rollouts(self.plan(), self.reward)

    def columns(self) -> dict[str, str]:
        """Name what the rewards read."""
        return self.live.rewards.needs() if self.reward else {}

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse rows that the rewards cannot score, and a server that cannot hold what trains.

        Raises:
            RecipeError: naming the key to change.
        """
        if self.sampler:
            self._check_server(recipe)
        check_rewards(self.live.rewards, data)

    def _check_server(self, recipe: Recipe) -> None:
        check_address(self.sampler, None, self.sampler_key_env, "objective.sampler")
        kinds = {name: entry.get("kind", name) for name, entry in recipe.stack.items()}
        others = [name for name, kind in kinds.items() if kind not in (*SERVED, *BASES)]
        if others or not set(SERVED) & set(kinds.values()):
            raise RecipeError(
                f"objective.sampler: a server holds the base and takes low-rank adapters ({', '.join(SERVED)}) after every "
                f"update; {f'stack.{others[0]} is none' if others else 'this recipe trains the weights themselves'}. Leave "
                "objective.sampler out, and the model that trains samples"
            )

    def prepare_roles(self, loaded: LoadedModel, frozen: bool) -> None:
        """Mount reward models on the policy's base, and get ready to hand the policy to a server."""
        self.live.rewards.prepare(loaded, frozen)
        if self.sampler:
            self.live.server = PolicyServer(self.sampler, self.sampler_key_env, loaded)

    def held_models(self, recipe: Recipe, frozen: bool) -> list[ModelSection]:
        """Return the models of the rewards that are not on the policy's base."""
        return self.live.rewards.held_models(recipe.model, frozen)

    def reference_of(self) -> str:
        """Return `initial`, the policy of step 0, or `none` where no reference is needed."""
        return "initial" if self.live.plan.reference else "none"

    def step_zero(self) -> dict[str, float]:
        """Return the values of step 0, where the policy that sampled is the policy being trained, and the reference."""
        found = {"policy/ratio": 1.0, "policy/approxkl": 0.0, "policy/clipfrac": 0.0}
        return {**found, "objective/kl": 0.0} if self.live.plan.reference else found

    def updates(self) -> int:
        """Return the number of optimizer steps per rollout."""
        return self.live.plan.updates

    def at_boundary(self) -> bool:
        """Return whether a checkpoint may be written: between rollouts."""
        return self.live.boundary

    def advantages(self, samples: list[Sample], roles: Roles) -> None:
        """Set the advantages of the answers of a rollout, by which the loss weights them."""
        raise NotImplementedError

    def corrected(self, losses: Tensor, batch: Batch) -> tuple[Tensor, dict[str, tuple[Any, float]]]:
        """Return surrogate losses, (N,) of tokens or (B,) of answers, weighted as `sampler_correction` says, and metrics."""
        if self.sampler_correction == "none":
            return losses, {}
        weights = sampler_weights(batch, self.sampler_correction, self.sampler_cap)
        metrics = weight_metrics(weights, self.sampler_cap)
        return losses * (weights if weights.shape == losses.shape else weights[batch.extra["answer"]]), metrics

    def batches(self, source: Iterable[list[dict[str, Any]]], roles: Roles) -> Iterator[list[Batch]]:
        """Sample a rollout for each batch of prompts and yield its updates."""
        judge = functools.partial(self.advantages, roles=roles)
        for rows in source:
            for micros in self.live.updates(rows, roles, judge):
                yield self.ready(micros, roles)

    def measures(self) -> Measures:
        """Return the score of held-out prompts and each reward in it; length and the like are neither good nor bad."""
        return {**HELD_OUT_METRICS, **dict.fromkeys(self.live.reward_names, "max")}

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Sample fresh answers to the rows' prompts and lay them out."""
        return self.ready([self.live.whole(rows, roles, functools.partial(self.advantages, roles=roles))], None)[0]

    def ready(self, micros: list[Batch], roles: Roles | None) -> list[Batch]:
        """Return the micro-batches of an optimizer step as the loss needs them.

        Args:
            roles: None for a single micro-batch of one process.
        """
        return micros

    def evaluation_rows(self, data: Rows, indices: list[int]) -> list[dict[str, Any]]:
        """Return held-out prompts, to be answered at `eval_temperature`."""
        return held_out(data, indices)

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Return metrics of held-out prompts."""
        return held_out_metrics(batch)

    def state(self) -> dict[str, Any]:
        """Return the state of the rollouts."""
        return self.live.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the state, to continue after the last whole rollout."""
        self.live.load_state(state)
