"""What objectives that learn from the policy's own answers share: prompts in, rollouts out, rewards and resume."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from llmrecipe.objectives.alignment._engines.rollout import (
    HELD_OUT_METRICS,
    Plan,
    Rollouts,
    Sample,
    check_rewards,
    held_out,
    held_out_metrics,
)
from llmrecipe.objectives.base import Measures

if TYPE_CHECKING:
    from llmrecipe.data.collate import Batch
    from llmrecipe.engine.role_models import Roles


class Sampled:
    """Mixed into an `Objective` whose rows are prompts. What differs: the options, `plan`, `advantages` and `loss`."""

    if TYPE_CHECKING:
        reward: dict[str, Any]
        temperature: float
        max_new_tokens: int
        epochs: int
        minibatches: int
        beta: float
        missing_end: float | None
        eval_temperature: float | None
        generation_batch: int
        show: int

    def plan(self, **own: Any) -> Plan:
        """How rollouts are made: the options, and what only this objective asks for."""
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "epochs": self.epochs,
            "minibatches": self.minibatches,
            "reference": self.beta > 0,
            "missing_end": self.missing_end,
            "held_out_temperature": self.eval_temperature,
            "generation_batch": self.generation_batch,
            "show": self.show,
        }
        return Plan(**{**options, **own})

    @functools.cached_property
    def live(self) -> Rollouts:
        """Where the rollouts stand."""
        return Rollouts(self.plan(), self.reward)

    def check(self, recipe: Any, data: Any) -> None:
        """Rewards that the rows can be scored with.

        Raises:
            RecipeError: naming the key to change.
        """
        check_rewards(self.live.rewards, data)

    def prepare_roles(self, opened: Any, frozen: bool) -> None:
        """Reward models on the policy's base."""
        self.live.rewards.prepare(opened, frozen)

    def reference_of(self) -> str:
        """The policy of step 0, unless nothing asks for it."""
        return "initial" if self.live.plan.reference else "none"

    def step_zero(self) -> dict[str, float]:
        """The policy that sampled is the policy that is trained, and the reference where there is one."""
        found = {"policy/ratio": 1.0, "policy/approxkl": 0.0, "policy/clipfrac": 0.0}
        return {**found, "objective/kl": 0.0} if self.live.plan.reference else found

    def updates(self) -> int:
        """Optimizer steps a rollout."""
        return self.live.plan.updates

    def at_boundary(self) -> bool:
        """Between rollouts."""
        return self.live.boundary

    def advantages(self, samples: list[Sample], roles: Roles) -> None:
        """Give the answers of a rollout what the loss weighs them by."""
        raise NotImplementedError

    def batches(self, source: Iterable[list[dict[str, Any]]], roles: Roles) -> Iterator[list[Batch]]:
        """A rollout for each batch of prompts, then its updates."""
        judge = functools.partial(self.advantages, roles=roles)
        for rows in source:
            for micros in self.live.updates(rows, roles, judge):
                yield self.ready(micros, roles)

    def measures(self) -> Measures:
        """The score of held-out prompts and each reward in it; what answers look like is neither good nor bad."""
        return {**HELD_OUT_METRICS, **dict.fromkeys(self.live.reward_names, "max")}

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Fresh answers to the rows' prompts."""
        return self.ready([self.live.whole(rows, roles, functools.partial(self.advantages, roles=roles))], None)[0]

    def ready(self, micros: list[Batch], roles: Roles | None) -> list[Batch]:
        """The micro-batches of an optimizer step as the loss wants them.

        Args:
            roles: None where the micro-batch of one process stands for itself.
        """
        return micros

    def evaluation_rows(self, data: Any, indices: list[int]) -> list[dict[str, Any]]:
        """Held-out prompts, answered at `eval_temperature`."""
        return held_out(data, indices)

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Scores of held-out prompts."""
        return held_out_metrics(batch)

    def state(self) -> dict[str, Any]:
        """Where the rollouts stand."""
        return self.live.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on after the last whole rollout."""
        self.live.load_state(state)
