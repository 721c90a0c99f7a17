"""The parts and the progress of a run, as evaluation, saving, reports and checks receive them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmrecipe.core.device_profile import profile_of
from llmrecipe.core.errors import RunError
from llmrecipe.core.key_reads import KeyReads
from llmrecipe.data import order
from llmrecipe.data.batch_plan import BatchPlan
from llmrecipe.data.collate import Batch
from llmrecipe.feedback.directions import direction
from llmrecipe.methods._base.stack import Stack
from llmrecipe.methods._base.update_rule import StepContext
from llmrecipe.models.sharded import is_sharded, local
from llmrecipe.recipe.sharding_rules import PLAIN
from llmrecipe.runs.events import is_step
from llmrecipe.training.best import BestTracker
from llmrecipe.training.evaluate import Evaluation
from llmrecipe.training.measured_memory import MemoryMeter
from llmrecipe.training.read_rows import general_rows
from llmrecipe.training.weight_changes import StartValues

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from llmrecipe.core.device_profile import Profile
    from llmrecipe.data.prepare import SplitRows
    from llmrecipe.data.token_data import TokenData
    from llmrecipe.engine.role_models import Roles
    from llmrecipe.models.pretrained import LanguageModel
    from llmrecipe.objectives.base import Objective
    from llmrecipe.recipe.compose import Composition
    from llmrecipe.recipe.schema import Recipe
    from llmrecipe.runs.events import Events
    from llmrecipe.runs.identity import Identity
    from llmrecipe.runs.open_model import LoadedModel
    from llmrecipe.runs.run_dir import RunDir
    from llmrecipe.runtime.processes import Runtime
    from llmrecipe.training.model_flops import ModelFlops
    from llmrecipe.training.resume_rules import Changes


@dataclass
class Progress:
    """Progress of a run."""

    step: int = 0
    """Optimizer steps made."""
    drawn: int = 0
    """Row batches drawn from the source."""
    tokens: int = 0
    """Real tokens the model has read in training, on this process."""
    skipped: int = 0
    """Steps that made no update because a loss or a gradient was not finite (`run.on_nan: skip`)."""
    skipped_lately: list[int] = field(default_factory=list)
    """Numbers of those among the last `finite_check.WINDOW` steps."""
    ended: bool = False
    """Whether the run has decided to end at this step (early stopping)."""

    def load(self, document: Mapping[str, Any]) -> None:
        """Take over what a checkpoint holds; what this version does not know is left out.

        Raises:
            ValueError: a value is none of its kind.
        """
        for name, value in document.items():
            if name not in vars(self):
                continue
            if type(value) is not type(vars(self)[name]) or (type(value) is int and not is_step(value)):
                raise ValueError(f"its progress has {name}={value!r:.60}")
            setattr(self, name, value)

    def advance(self, micros: list[Batch]) -> None:
        """Count one more optimizer step."""
        self.step += 1
        self.tokens += sum(m.tokens for m in micros)


@dataclass
class RunState:
    """A run's parts and its progress."""

    composition: Composition
    dir: RunDir
    """The run directory."""
    runtime: Runtime
    """Processes and devices."""
    events: Events
    objective: Objective
    stack: Stack
    optim: Any
    """The optimizer's options."""
    schedule: Any
    loaded: LoadedModel
    data: SplitRows
    """Training rows."""
    validation: SplitRows | None
    """Validation rows; None without any."""
    roles: Roles
    optimizer: torch.optim.Optimizer | None
    """None where an update rule brings its own, and before anything trains."""
    steps: int
    """Optimizer steps of the whole run."""
    best: BestTracker
    progress: Progress = field(default_factory=Progress)
    changes: Changes = field(default_factory=dict)
    """What a resume changes in the run's recipe."""
    identity: Identity | None = None
    """What the run is made of; None on processes that do not write."""
    first_step: int = 0
    """Steps an earlier process had made."""
    learning_rate: float = 0.0
    unused: bool = True
    """Whether a step may leave trained tensors without a gradient; decided at the first step (see `first_step`)."""
    unread: frozenset[str] = frozenset()
    """Weights that train because everything does and that the objective does not read (see `first_step`)."""
    reads: KeyReads = field(default_factory=KeyReads)
    """Which options of the recipe have been read, until the first update."""
    noted: float = 0.0
    """When `status.json` last named the step, on the clock of `time.monotonic`."""
    saved_at: float = field(default_factory=time.monotonic)
    """Time of the newest checkpoint, or of the start; in seconds, of this process's clock."""
    save_cost: float = 0.0
    """Seconds that the newest checkpoint took."""
    meter: MemoryMeter = field(default_factory=MemoryMeter)
    """What the run holds in memory."""
    flops: ModelFlops | None = None
    """What utilisation is computed from; None where it is not known."""
    start: StartValues | None = None
    """What the weights were before the first step; None where they are divided, and on processes that do not report."""
    reads_late: bool = False
    """Whether values of a step are read while the next one is computed, from the second update on."""
    late: bool = False
    """Whether those of the running step are."""
    failure: RunError | None = None
    """Why the run ends, found in the values of a step that were read late."""
    signal: int | None = None
    """The signal that stops the run."""

    @property
    def recipe(self) -> Recipe:
        """Return the validated recipe."""
        return self.composition.recipe

    @property
    def model(self) -> LanguageModel:
        """Return the trained model, unwrapped."""
        return self.roles.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer."""
        return self.loaded.tokenizer

    @property
    def profile(self) -> Profile:
        """Return what the run's device computes by."""
        return profile_of(self.runtime.device)

    @cached_property
    def plan(self) -> BatchPlan:
        """Return which training rows each batch has."""
        return BatchPlan.of(self.recipe.batch, len(self.data))

    @cached_property
    def general(self) -> dict[str, TokenData]:
        """Return the general sets of `eval.forgetting`, which are scored several times."""
        return general_rows(self.recipe, self.objective)

    def order(self, epoch: int) -> np.ndarray | range:
        """Return the row indices of an epoch in training order."""
        if getattr(self, "_order_epoch", None) != epoch:
            self._order, self._order_epoch = order(self.data, self.recipe.seed, epoch), epoch
        return self._order

    def total_weight(self, micros: list[Batch]) -> float:
        """Return the loss denominator of a step, over all micro-batches and processes."""
        own = sum(self.objective.weight(m) for m in micros)
        return float(self.runtime.sum(torch.tensor([own], dtype=torch.float64)))

    def step_context(self) -> StepContext:
        """Return what the next update may use."""
        return StepContext(
            self.progress.step, self.steps, self.learning_rate, self.recipe.seed, self.dir.path, self.model, self.stack,
            self.optimizer, self.objective, self.roles, self.runtime, self.total_weight, self.clip, self.late,
        )  # fmt: skip

    def clip(self) -> Tensor | float:
        """Clip the gradient norm over everything that trains; returns the norm before clipping."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if not parameters:
            return 0.0
        return self.runtime.clip(parameters, self.optim.clip or float("inf"))

    def divided_weights(self) -> dict[str, Tensor]:
        """Return what was learned of which each process may write its own part (`runtime.state_dict=sharded`), by name.

        Nothing where a method computes what it saves: that takes whole tensors.
        """
        if self.recipe.runtime.state_dict != "sharded":
            return {}
        delta, held = self.stack.delta(self.model), {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        plain = all(n in held and local(t).data_ptr() == local(held[n]).data_ptr() for n, t in delta.items())
        return {n: t for n, t in delta.items() if is_sharded(t)} if plain else {}

    def whole(self, everything: bool = False, write: bool = False, leave: Collection[str] = ()) -> AbstractContextManager[None]:
        """Return a context in which the main process has whole what the processes divide: what trains and what is saved.

        Args:
            everything: the frozen parameters too.
            write: every process has it, and what is written into it is divided again on exit.
            leave: names of what stays divided.
        """
        if not self.runtime.in_step:
            return contextlib.nullcontext()
        names = {n for n, p in self.model.named_parameters() if everything or p.requires_grad} | set(
            self.stack.delta(self.model)
        )
        return self.runtime.whole(self.model, names - set(leave), write)

    def evaluation(self) -> Evaluation:
        """Return what an evaluation needs of the run."""
        return Evaluation(
            self.recipe.eval, self.recipe.batch.size, self.objective, self.roles, self.runtime, self.events, self.progress.step
        )

    def keep_start(self, own: bool) -> None:
        """Keep a sample of the weights, to show in the end how far training moved them.

        Args:
            own: also of what the methods added; False where training began with other values.
        """
        if self.runtime.is_main and self.runtime.shard == PLAIN:
            self.start = StartValues(self.model, own)

    def fresh_best(self) -> BestTracker:
        """Return a tracker that has seen nothing."""
        return BestTracker(self.recipe.eval, direction(self.recipe.eval, self.objective))
