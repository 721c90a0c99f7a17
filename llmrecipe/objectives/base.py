"""The interface of an objective, and the auxiliary models (policy, reference, value, ...) it may use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic.dataclasses import dataclass as pydantic_dataclass

from llmrecipe.core.registry import CONFIG
from llmrecipe.models.image_processor import places

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig

    from llmrecipe.core.tasks import Tasks
    from llmrecipe.data.collate import Batch
    from llmrecipe.data.prepare import Rows, SplitRows
    from llmrecipe.engine.reference_policy import PlannedRows
    from llmrecipe.engine.role_models import Roles
    from llmrecipe.models.pretrained import LanguageModel
    from llmrecipe.recipe.schema import ModelSection, Recipe
    from llmrecipe.runs.open_model import LoadedModel


Measures = Mapping[str, Literal["min", "max"] | None]
"""Metric -> whether less or more of it is better; None where that depends on what is wanted."""


@dataclass(frozen=True)
class Loss:
    """What one micro-batch contributes to an optimizer step."""

    total: Tensor
    """A sum, not a mean; the loop divides by the weight of the whole step."""
    metrics: dict[str, tuple[Any, float]] = field(default_factory=dict)
    """name -> (sum, count), reduced over micro-batches and ranks, then divided once; or a `Largest` or `Smallest` value."""
    auxiliary: Tensor | float = 0.0
    """What the model itself and penalties add while training, in the unit of `total`; no part of the reported loss."""


@pydantic_dataclass(config=CONFIG, kw_only=True)
class Objective:
    """Base class of what a run optimises. Fields are the keys of the recipe's `objective` section."""

    group: ClassVar[str] = "objective"
    rows: ClassVar[str] = "dialogue"
    """Row type it reads (see llmrecipe.data)."""
    head: ClassVar[str] = "causal"
    """Kind of model head: causal, classification, masked, seq2seq or image; states, for a text model without its head; or
    language, for whichever of causal, masked and seq2seq the model has."""
    encoder_decoders: ClassVar[bool] = False
    """Whether it trains encoder-decoders in the place of decoders, too: the encoder reads the prompt, the decoder answers."""
    answers_labels: ClassVar[bool] = False
    """Whether it adds a head of its own with one output for each label of the training rows; the model's config keeps their
    names, as it does for the heads of classification."""
    special_tokens: ClassVar[tuple[str, ...]] = ()
    """Roles of special tokens (eos, mask, sep, cls) that a tokenizer trained for it must have."""
    roles: ClassVar[tuple[str, ...]] = ()
    """Auxiliary models besides the policy: reference, reward, value, judge, hypermodel."""
    dropout: ClassVar[bool] = True
    """Whether dropout stays on while training; comparisons with a reference switch it off."""
    pairs_rows: ClassVar[bool] = False
    """Whether a row's reference log-probabilities depend on the other rows of its step (mismatched pairs)."""
    resampled: ClassVar[bool] = False
    """Whether `finish_evaluation` gives estimates of a population, with one entry a row in the tensors of `collect`: an
    interval of them comes from rows drawn again."""
    gives_examples: ClassVar[bool] = False
    """Whether its batches hold the examples that a hypermodel makes adapters from: the stack needs one."""
    samples: ClassVar[bool] = False
    """Whether the policy writes the rows it is trained on, so that none can be scored beforehand."""

    headline: ClassVar[tuple[str, ...]] = ("accuracy",)
    """The few metrics besides the loss that a person follows while it trains: the screen shows those that a step or an
    evaluation has; the run keeps all."""

    waits: ClassVar[str] = ""
    """What of the device's values the host has to know of a step before the next one begins; empty: nothing."""
    shards: ClassVar[tuple[str, ...]] = ()
    """Values of `runtime.shard` under which it has been shown to train what one process trains."""
    unsharded: ClassVar[str] = ""
    """Why it is refused under others, as the end of a message."""
    whole_options: ClassVar[dict[str, dict[str, str]]] = {}
    """Option -> value -> why it is refused where a process holds a part of each weight."""

    def loss_mask(self) -> str:
        """Return the name of the loss mask: which tokens of a row the data layer marks as trained."""
        return "completion"

    def has_gradient(self) -> bool:
        """Return whether the loss has a gradient; without one it needs an update rule that does without (MeZO)."""
        return True

    def generates(self) -> bool:
        """Return whether a step generates answers, of lengths that nothing says beforehand."""
        return self.samples

    def label_names(self) -> list[str] | None:
        """Return the names of the outputs of the head, in order; None where they are the labels of the training rows.

        Labels that are whole numbers stand for these names.
        """
        return None

    def model_head(self) -> str:
        """Return the head that the model is loaded with: `head`, unless options choose another."""
        return self.head

    def read_folder(self, section: ModelSection) -> None:
        """Take from the folder of a model what options leave open, before the head is chosen."""

    def tasks(self) -> Tasks | None:
        """Return which column names the task of a row, for an objective that needs it."""
        return None

    def columns(self) -> Mapping[str, str]:
        """Column that every prompt row must hold besides its prompt -> key path of what reads it."""
        return {}

    def unread(self) -> Sequence[str]:
        """Return the columns of its row type that it does not read; a run names those that its rows have."""
        return ()

    def slots(self, config: PreTrainedConfig, shape: tuple[int, ...]) -> int:
        """Return how many places of the model's input the features of a row take, where rows name pictures or feature files.

        Args:
            config: of the model.
            shape: (C, H, W) of a picture, (m, d) of vectors.
        """
        return places(config, shape)

    def check(self, recipe: Recipe, data: SplitRows) -> None:
        """Refuse a recipe this objective cannot run on these training rows.

        Raises:
            RecipeError: naming the key to change.
        """

    def prepare_rows(self, recipe: Recipe, rows: PlannedRows, device: torch.device) -> None:
        """Compute what another model says of every row of a run, before the policy is loaded, so that one model is in memory.

        Args:
            device: where the run computes.
        """

    def prepare_roles(self, loaded: LoadedModel, frozen: bool) -> None:
        """Mount the finished models of other roles on the policy's freshly loaded base, before the stack is attached.

        Args:
            frozen: whether the stack leaves the weights of the base as they are.
        """

    def held_models(self, recipe: Recipe, frozen: bool) -> list[ModelSection]:
        """Return the models that a run holds in memory in addition to the policy while it trains, for the memory estimate.

        Args:
            frozen: whether the stack leaves the weights of the base as they are.
        """
        return []

    def role_wrappers(self, stack: list[Any]) -> list[Any]:
        """Return the adapters of other roles on the same base (`Wrapper.role`), trained together with the policy's stack."""
        return []

    def reference_of(self) -> str:
        """Return which policy the reference is: `initial` (step 0), `base` (the model without a stack), `none`, or a folder."""
        return "initial" if "reference" in self.roles else "none"

    def reference_moves(self) -> bool:
        """Return whether the reference follows the policy during the run, so that nothing can be scored beforehand."""
        return False

    def compares_distributions(self) -> bool:
        """Return whether it compares whole distributions with the reference's, which no stored score of a row holds."""
        return False

    def reference_batches(self, rows: list[dict[str, Any]], roles: Roles) -> Iterator[Batch]:
        """Yield the batches whose reference log-probabilities the rows of one step need."""
        for part in roles.split(rows):
            yield self.collate(part, roles)

    def step_zero(self) -> dict[str, float]:
        """Return name -> value that loss and metrics must have before the first step, where policy and reference agree."""
        return {}

    def facts(self, roles: Roles) -> dict[str, Any]:
        """Return JSON facts for the run's report: what was counted or chosen from the data."""
        return {}

    def documents(self, roles: Roles) -> dict[str, dict[str, Any]]:
        """Return file name -> JSON content that the finished model is stored with: how its states are to be read."""
        return {}

    def measures(self) -> Measures:
        """Return every metric that `evaluate` and `finish_evaluation` may report besides `loss`, and its better direction.

        None says that it depends on what is wanted: `eval.monitor` then needs `eval.mode`. An objective that declares
        metrics must declare all of them, because `eval.monitor` refuses any other before training.
        """
        return {}

    def measured_columns(self) -> Mapping[str, str]:
        """Return metric -> column of the token rows without which no evaluation reports it."""
        return {}

    def collate(self, rows: list[dict[str, Any]], roles: Roles) -> Batch:
        """Build one micro-batch from token rows. No rows give a batch without targets."""
        raise NotImplementedError

    def batches(self, source: Iterable[list[dict[str, Any]]], roles: Roles) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each optimizer step from its rows. Objectives that sample do it here."""
        for rows in source:
            parts = [rows] if self.whole_step else roles.split(rows)
            yield [self.collate(part, roles) for part in parts]

    @property
    def whole_step(self) -> bool:
        """Return whether a row is compared with the other rows of its step, which is then one batch."""
        return False

    def updates(self) -> int:
        """Return the number of optimizer steps made from the rows of one batch."""
        return 1

    def at_boundary(self) -> bool:
        """Return whether a checkpoint may be written now (false between the updates of one rollout)."""
        return True

    def weight(self, batch: Batch) -> float:
        """Return the loss denominator, what the sum of losses is divided by: the number of supervised tokens by default."""
        return float(batch.target.numel())

    def prepare_model(self, model: LanguageModel, seed: int) -> None:
        """Add the heads the objective trains to a freshly loaded model; called before the stack is attached."""

    def finish(self, roles: Roles) -> None:
        """Finish the objective after the last step, on the weights that will be kept, before they are written."""

    def start(self, roles: Roles) -> None:
        """Prepare the objective once before the first step, after calibration: precomputed references, step-0 checks."""

    def after_step(self, step: int, metrics: Mapping[str, float], roles: Roles) -> None:
        """React to an optimizer step; called after each one.

        Args:
            step: updates made so far, this one included.
            metrics: what the step reports, over all micro-batches and processes.
        """

    def loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return the summed loss of a micro-batch (`Loss.total`: a scalar tensor, ()), with its graph."""
        raise NotImplementedError

    def training_loss(self, batch: Batch, roles: Roles) -> Loss:
        """Return `loss` with what the model adds of its own, weighted like the rows it comes from.

        For a mixture of experts that is its load-balancing loss (`models.load_balance`), reported as `auxiliary_loss`; of
        several passes over a micro-batch it is the mean. Micro-batches are balanced one by one.
        """
        with roles.collecting() as found:
            loss = self.loss(batch, roles)
        if not found:
            return loss
        weight = self.weight(batch)
        added = sum(found[1:], found[0]) / len(found) * weight
        return replace(
            loss, auxiliary=loss.auxiliary + added, metrics={**loss.metrics, "auxiliary_loss": (added.detach(), weight)}
        )

    def evaluation_rows(self, data: Rows, indices: list[int]) -> list[dict[str, Any]]:
        """Return the rows of a split that one process evaluates."""
        return [data[i] for i in indices]

    def examples_of(self, data: Rows, indices: list[int], roles: Roles) -> tuple[Tensor, Tensor]:
        """Return ids and mask (K, T') of the texts from which the adapter of each of K rows is made before it is answered.

        Needed where `gives_examples` and rows have prompts.
        """
        raise NotImplementedError

    def evaluate(self, batch: Batch, roles: Roles) -> dict[str, tuple[Any, float]]:
        """Return name -> (sum, count) for one evaluation batch; `loss` by default."""
        loss = self.loss(batch, roles)
        return {"loss": (loss.total, self.weight(batch)), **loss.metrics}

    def finish_evaluation(self, sums: dict[str, float], tensors: dict[str, torch.Tensor]) -> dict[str, float]:
        """Return metrics that need the whole set at once (macro F1), from the gathered tensors (R, ...) of `collect`."""
        return {}

    def breakdown(self, tensors: dict[str, torch.Tensor], roles: Roles) -> dict[str, dict[str, Any]]:
        """Return file name -> JSON content with what the scores of a whole set are made of, from the tensors of `collect`."""
        return {}

    def collect(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """Return per-row tensors (R, ...) to be gathered over the whole evaluation set for `finish_evaluation`.

        It may make the passes of `evaluate` again: each is made once.
        """
        return {}

    def state(self) -> dict[str, Any]:
        """Return the JSON state of a running objective (a KL controller, a rollout cursor)."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
