"""The interface of a method: named hooks, each method overrides only what it needs."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic.dataclasses import dataclass as pydantic_dataclass

from llmrecipe.core.errors import ModelError
from llmrecipe.core.registry import CONFIG
from llmrecipe.models.hooks.hook import own_tensors
from llmrecipe.models.stored_tensors import copy_saved

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from llmrecipe.core.tasks import Tasks
    from llmrecipe.methods._base.update_rule import UpdateRule


class Stage(enum.IntEnum):
    """When a wrapper acts; list order decides only inside a stage."""

    BASE = 0
    """Changes how base weights are stored (quantization)."""
    INJECT = 1
    """Adds modules at sites; the base is frozen."""
    SELECT = 2
    """Opens base parameters, or entries of them."""
    FREEZE = 3
    """Lets part of what the others train rest."""
    ANCHOR = 4
    """Adds a term to the loss, and changes neither what trains nor how."""
    RULE = 5
    """Replaces how one update is made."""


@dataclass(frozen=True)
class ParamGroup:
    """Trained parameters with their own learning rate or weight decay."""

    names: frozenset[str]
    """Full parameter names."""
    lr_scale: float = 1.0
    """Multiplies the learning rate."""
    weight_decay: float | None = None
    """Replaces the optimizer's decay; None keeps it."""


@dataclass
class Probe:
    """What `calibrate` may look at before step 0."""

    batches: Any
    """`batches(n) -> Iterator[Batch]`: training batches in a seeded order that training does not share."""
    loss: Any
    """`loss(batch) -> Tensor`: the objective's mean loss of a batch with its graph."""
    world: Any = field(default=None)
    """The runtime, for reductions over ranks."""
    weight: Any = field(default=None)
    """`weight(batch) -> float`: what the mean loss of a batch was divided by (tokens, pairs or rows)."""
    rows: int = 0
    """How many training rows there are."""
    steps: int = 0
    """Optimizer steps of the run."""
    tokenizer: Any = field(default=None)
    """The run's tokenizer, for starts that are written as text."""
    engine: Any = field(default=None)
    """What answers for the model outside training: `engine(batch, want=...)`, without autocast."""
    original: Any = field(default=None)
    """`original() -> nn.Module`: a fresh copy of the base model, in the dtype it had before any quantization."""
    micros: Any = field(default=None)
    """`micros(n, rows) -> Iterator[list[Batch]]`: the same batches, each cut into micro-batches as a training step is."""
    capped: Any = field(default=None)
    """`capped(n, rows) -> int`: how many of n batches there are when no row is read twice."""
    of: Any = field(default=None)
    """`of(path) -> Probe`: the same over the rows of another place (see `Wrapper.calibration_data`)."""

    def groups(self, n: int, rows: int | None = None) -> Iterator[list[Any]]:
        """Yield at most n batches as lists of micro-batches.

        Args:
            rows: rows of a batch; None for the recipe's.
        """
        if self.micros is not None:
            return self.micros(n, rows)
        return ([batch] for batch in self.batches(n, rows))

    def count(self, n: int, rows: int | None = None) -> int:
        """Return how many batches `groups` yields."""
        return n if self.capped is None else self.capped(n, rows)


@pydantic_dataclass(config=CONFIG, kw_only=True)
class Wrapper:
    """One method of the stack. A frozen config: what it learns lives in named tensors of the model, or in `state()`."""

    group: ClassVar[str] = "stack"
    stage: ClassVar[Stage] = Stage.INJECT
    mergeable: ClassVar[bool] = False
    """Whether `merge` folds the method into the base weights exactly (up to rounding)."""
    unmergeable: ClassVar[str] = ""
    """Why the method cannot be folded, for the message of an export; only where `mergeable` is False."""
    adjustable: ClassVar[tuple[str, ...]] = ()
    """Options that may be changed on a finished run (`eval RUN stack.dylora.rank=2`)."""
    identity: ClassVar[bool] = True
    """Whether the wrapped model equals the base at step 0; where not, the docstring says why."""
    masters: ClassVar[bool] = True
    """False for a rule that trains 16-bit weights as they are, without float32 copies."""
    held_by_values: ClassVar[bool] = False
    """Whether what it holds in memory depends on the values of weights, so that shapes alone do not tell it."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Kinds that must be in the stack too."""
    compute_options: ClassVar[tuple[str, ...]] = ()
    """Options of a wrapper of stage BASE that do not change how the base is stored."""
    modality: ClassVar[str] = ""
    """What a model must read for the method to have a place in it, `text` or `images`; empty where either will do."""
    otherwise: ClassVar[str] = ""
    """What to use on a model of another modality, as the end of a message."""
    conflicts: ClassVar[dict[str, str]] = {}
    """Kind -> the one-line reason why it cannot share a stack with this one."""
    conflicts_by_default: ClassVar[dict[str, str]] = {}
    """Kind -> why its default options cannot share a stack with this one, and which can. What was given is judged when both are
    attached (`check_attached`); tables of pairs say this."""
    needs_gradients: ClassVar[str] = ""
    """What the method does with gradients, such as `masks gradients`, where it cannot do without them."""
    gradient_free: ClassVar[bool] = False
    """Whether it is an update rule that makes no gradients."""
    alone: ClassVar[str] = ""
    """What the method does that leaves no place for another one that trains something of the policy, as `writes ...`."""
    needs_base: ClassVar[str] = ""
    """What the method does with the weights of the base, as `anchors the base`, where that is nothing unless they train."""
    waits: ClassVar[str] = ""
    """What of the device's values the host has to know during a step, because the method decides by it; empty: nothing, and no
    step waits for the device."""
    shards: ClassVar[tuple[str, ...]] = ()
    """Values of `runtime.shard` under which it has been shown to train what one process trains."""
    unsharded: ClassVar[str] = ""
    """Why it is refused under others, as the end of a message."""
    whole_options: ClassVar[dict[str, dict[str, str]]] = {}
    """Option -> value -> why it is refused where a process holds a part of each weight."""
    reads_examples: ClassVar[bool] = False
    """Whether it makes adapters from the examples that an objective gives (`Objective.gives_examples`)."""
    lifecycle_hooks: ClassVar[tuple[str, ...]] = ()
    """Lifecycle hooks the method depends on; the run stops when one has not fired by the end of step 1."""

    name: str = ""
    """Its key in the stack; owns every tensor called `....<name>....`."""
    role: str = ""
    """The one role its hooks serve (`value`, `reward`); empty for the policy's own methods, which serve all but `reference`."""

    def check_stack(self, wrappers: Sequence[Wrapper]) -> None:
        """Refuse what its options and the rest of the stack make impossible, before any weight is read.

        Args:
            wrappers: the entire stack, this one included.

        Raises:
            RecipeError: naming the option.
        """

    def check_attached(self, model: nn.Module) -> None:
        """Refuse what other wrappers changed in the model, once all of them are attached; `check` and a run both get here.

        Raises:
            ModelError: naming the other one.
        """

    def expand(self, model: nn.Module) -> list[Wrapper]:
        """Return the wrappers this one stands for; a hybrid returns others, with placements and gates."""
        return [self]

    def load_kwargs(self) -> dict[str, Any]:
        """Return arguments that `from_pretrained` needs for this method (NF4, int8)."""
        return {}

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add modules at sites and open parameters.

        Args:
            structure: what `structure()` returned when a delta was saved (ranks, masks); None for a fresh start.
        """

    def structure(self, model: nn.Module) -> dict[str, Any]:
        """Return JSON facts that `attach` needs to rebuild the same tensors for a saved delta."""
        return {}

    def calibrate(self, model: nn.Module, probe: Probe) -> None:
        """Make a data-dependent choice before step 0; not run again on resume."""

    def calibrates(self) -> bool:
        """Return whether `calibrate` chooses or initializes something from data; where an option decides, it decides here."""
        return type(self).calibrate is not Wrapper.calibrate

    def chooses(self) -> bool:
        """Return whether `calibrate` decides what trains or what a step keeps; not where it fills tensors that are there."""
        return self.calibrates()

    def calibration_data(self) -> str | None:
        """Return a data path, where `calibrate` looks at other rows than the run's own; they are read before any weight."""
        return None

    def penalty(self, model: nn.Module) -> Tensor | float:
        """Return a term added to the mean loss of every optimizer step, a scalar."""
        return 0.0

    def penalizes(self) -> bool:
        """Return whether `penalty` adds a term; where that depends on an option, the option decides here."""
        return type(self).penalty is not Wrapper.penalty

    def before_step(self, model: nn.Module, step: int) -> bool | None:
        """Prepare the micro-batches of a step; return True when the set of trained tensors must change (see `rebuild`)."""

    def shortens(self) -> bool:
        """Return whether trained tensors lose rows during the run (see `cuts`)."""
        return False

    def cuts(self, model: nn.Module) -> dict[str, tuple[int, Tensor]]:
        """Return tensors that the last `before_step` shortened: name -> (axis, indices kept); the optimizer's state follows."""
        return {}

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Change or inspect the gradients of the step, summed and clipped, before the optimizer moves."""

    @classmethod
    def reads_gradients(cls) -> bool:
        """Return whether the method acts on gradients, also where it does not declare that (`needs_gradients`)."""
        return bool(cls.needs_gradients) or cls.after_backward is not Wrapper.after_backward

    def after_step(self, model: nn.Module, step: int) -> None:
        """Change or inspect the trained tensors after the optimizer has moved; gradients still exist."""

    def finish(self, model: nn.Module) -> None:
        """Drop what only training needed (the MLP of a prefix), after the last step and before the result is written."""

    def stepping(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> contextlib.AbstractContextManager[None]:
        """Return a context for the optimizer's own step: for methods that keep entries, moments included, out of it."""
        return contextlib.nullcontext()

    def metrics(self, model: nn.Module) -> Mapping[str, Tensor | float]:
        """Return what the method reports at every step (ranks, masks), by name; scalars of the device are read later."""
        return {}

    def mixes(self) -> Tasks | None:
        """Return the tasks whose rows one batch may mix, for a method that keeps them apart; None for all others."""
        return None

    def for_tasks(self, tasks: Tasks | None) -> Wrapper:
        """Return the wrapper with the names of the tasks filled in, once the rows are read."""
        return self

    def rule(self) -> UpdateRule | None:
        """Return an update rule that replaces back-propagation; at most one in a stack."""
        return None

    def starts_at_base(self) -> bool:
        """Return whether the base is the policy of step 0; where `identity` depends on an option, the option decides here."""
        return self.identity

    def groups(self, model: nn.Module) -> list[ParamGroup]:
        """Return parameters with their own learning rate or decay."""
        return []

    def frozen(self, model: nn.Module) -> set[str]:
        """Return names of its own injected parameters that do not train (LoRA-FA's A)."""
        return set()

    def opened(self, model: nn.Module) -> set[str]:
        """Return names of base parameters a SELECT wrapper trains."""
        return set()

    def resting(self, model: nn.Module) -> set[str]:
        """Return names of parameters, of any wrapper or of the base, that do not train for now.

        They stay part of what is saved. Where the set changes, `before_step` returns True.
        """
        return set()

    def may_skip(self, name: str) -> bool:
        """Return whether the first step may leave this hook or tensor of its own unused; the run stops for any other.

        For tensors whose turn comes by chance or later: experts without a token, ranks or sub-networks that were not drawn.

        Args:
            name: full name of a parameter, or of a hook (its host's path and its own name).
        """
        return False

    def merges(self) -> bool:
        """Return whether `merge` is possible; where `mergeable` depends on an option, the option decides here."""
        return self.mergeable

    def merge(self, model: nn.Module) -> None:
        """Fold the method into the base weights and remove its hooks.

        Raises:
            ModelError: the method cannot be folded (see `mergeable`).
        """
        raise ModelError(f"stack.{self.name}: {type(self).__name__} cannot be merged into the base weights")

    def as_tokens(self, model: nn.Module) -> Tensor | None:
        """Return embeddings (P, D) of tokens that do what the method does when every text begins with them; None otherwise."""
        return None

    def delta(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors that hold what was learned; by default the wrapper's own and those it trains in the base."""
        names = set(own_tensors(model, self.name)) | self.opened(model)
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {name: state[name].detach() for name in sorted(names)}

    def restore(self, model: nn.Module, delta: dict[str, Tensor]) -> None:
        """Put a saved delta back into an attached model, bit for bit.

        Raises:
            ValueError: its tensors have other shapes than the model's.
        """
        copy_saved(model, delta)

    def training_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return live tensors that training alone needs and `attach` cannot rebuild: checkpoints hold them, results do not."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return JSON facts of a running method that tensors do not hold."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""

    def grids(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """Return tables of numbers that a run's report draws as pictures, by title.

        Each has `rows` and `columns` (what they are), `values` (a list of rows), and `marked` (columns drawn with a frame, a
        list for each row).
        """
        return {}

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms for the memory report: `trainable`, `optimizer_bytes`, ... in parameters or bytes."""
        return {}

    def describe(self, model: nn.Module) -> Iterator[tuple[str, int]]:
        """Yield (what, how many parameters) lines shown at start: its own tensors that train."""
        parameters, frozen = dict(model.named_parameters()), self.frozen(model)
        for name in own_tensors(model, self.name):
            if name in parameters and name not in frozen:
                yield name, parameters[name].numel()
