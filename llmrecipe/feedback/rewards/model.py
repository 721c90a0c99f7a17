"""A trained reward model as a reward."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmrecipe.core.errors import ModelError, RecipeError, RunError
from llmrecipe.core.option_types import Literal, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.models.checkpoint_path import run_folder
from llmrecipe.objectives.reward_interface import Answer, Reward
from llmrecipe.recipe.content_key import REFERENCE
from llmrecipe.recipe.rights import rights_of
from llmrecipe.recipe.schema import ModelSection

if TYPE_CHECKING:
    from llmrecipe.engine.role_models import Roles
    from llmrecipe.runs.open_model import LoadedModel


@dataclass
class RewardModel:
    """The reward model's place: a separate model or the policy's base."""

    model: Any = None
    """A separate model, or the engine of the policy whose base it shares."""
    shared: Any = None
    off: frozenset[str] = frozenset()
    rights: dict[str, bool] = field(default_factory=dict)
    """What the recipe allows the models it opens."""


@register
class Model(Reward):
    """Scores of a finished `reward` run, normalised as that run stored them.

    Where the run's adapters stand on the policy's own base, and the policy leaves that base frozen, they are mounted there for
    the role `reward`: no second base is held. Elsewhere the run is opened as a model of its own.
    """

    path: str = ""
    """Run directory of the reward model."""
    share: Literal["auto", "on", "off"] = "auto"
    """Whether it lives on the policy's base; `on` makes it an error where that cannot be."""
    batch_tokens: PositiveInt = 8192
    """Most padded tokens scored at once."""

    @functools.cached_property
    def place(self) -> RewardModel:
        """Hold the model, once `prepare` or `open` has set it."""
        return RewardModel()

    def check(self, columns: Sequence[str], where: str) -> None:
        """Refuse a run that does not exist or is not finished."""
        if not self.path:
            raise RecipeError(f"{where}.path: must be given: the directory of a finished reward run (recipe=reward)")
        if REFERENCE.fullmatch(self.path):  # a stage of a pipeline that has not run yet
            return
        if run_folder(self.path) is None:
            raise RecipeError(f"{where}.path: {self.path} is no finished run; train one with `llmrecipe train recipe=reward`")

    def prepare(self, loaded: LoadedModel, frozen: bool) -> None:
        """Mount the run on the policy's base where that is possible."""
        from llmrecipe.models import task_heads
        from llmrecipe.objectives.alignment._engines.scoring import ROLE, add_reward

        self.place.rights = rights_of(loaded.section)
        if self.share == "off":
            return
        if not frozen or ROLE in task_heads.head_roles(loaded.model):
            if self.share == "on":
                why = "another reward model stands there" if frozen else "the policy's stack trains it"
                raise RecipeError(f"objective.reward: {self.path} cannot share the policy's base: {why}")
            return
        try:
            self.place.shared = add_reward(loaded, self.path)
        except (ModelError, RunError):
            if self.share == "on":
                raise

    def held_models(self, policy: ModelSection, frozen: bool) -> list[ModelSection]:
        """Return the run's model, unless its adapters can stand on the policy's base."""
        from llmrecipe.runs.open_model import resolve_section

        if REFERENCE.search(self.path):
            return []
        own = ModelSection.model_validate({"path": self.path, **rights_of(policy)})
        if self.share == "off" or not frozen:
            return [own]
        base, saved, _ = resolve_section(own, tensors=False)
        return [] if saved is not None and base.path == resolve_section(policy, tensors=False)[0].path else [own]

    def open(self, roles: Roles) -> None:
        """Load the run as a separate model, unless it is mounted on the policy's base."""
        if self.place.shared is not None:
            self.place.model = roles.engine
            self.place.off = self.place.shared.off | {w.name for w in roles.stack}
            return
        from llmrecipe.interop.load_run import load

        model, tokenizer = load(
            self.path,
            device=str(roles.device),
            trust_remote_code=self.place.rights.get("trust_remote_code", False),
            allow_pickle=self.place.rights.get("allow_pickle", False),
        )
        if tokenizer.get_vocab() != roles.tokenizer.get_vocab():
            raise ModelError(
                f"objective.reward: {self.path} reads other tokens than the policy writes; train the reward model from the "
                "policy's base"
            )
        self.place.model = model

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """Compute gain * s + bias of prompt and answer together."""
        from llmrecipe.objectives.alignment._engines.scoring import ROLE, score_sequences

        place = self.place
        role = ROLE if place.shared is not None else "policy"
        whole = [[*a.prompt_ids, *a.ids] for a in answers]
        return score_sequences(place.model, whole, role=role, off=place.off, tokens=self.batch_tokens).tolist()
