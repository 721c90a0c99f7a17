"""Blocks at rest: part of a model does not train for now, and keeps no activations."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.foreign import stored_count, stored_number
from llmrecipe.core.option_types import Literal, NonNegativeInt, OpenFraction, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Probe, Stage, Wrapper
from llmrecipe.methods.memory._engines.block_scores import BlockNorms, active_blocks, blocks_of, owners_of

if TYPE_CHECKING:
    from torch import Tensor, nn


@register
class Freeze(Wrapper):
    """Freezing of chosen blocks: dL/dW = 0 for W in a block at rest, whatever method the rest of the stack puts into it.

    Alone in a stack it is full fine-tuning of the other blocks. Below the lowest block that trains, nothing is kept for the
    backward pass, which ends there; the embedding rests too, with an output head that shares its weight. A block at rest above
    that one still passes gradients down: it keeps what they need, and saves the inputs of its own trained layers, their
    gradients and optimizer state. `static` leaves `layers` at rest for the whole run. `dynamic` chooses every `interval` steps
    which `active` blocks train: those with the largest running mean of |g| (`grad_norm`), of |g| / (L - i), where L - i blocks
    keep activations for block i (`cost`), or by chance, always with the top one (`random`). With `contiguous` all blocks above
    the lowest chosen one train too, which costs no further activations but their trained inputs.

    Means of |g| are first measured before step 0 over `score_batches` batches, at the memory of training everything; a block at
    rest keeps its last one. A block that rests loses its optimizer state and returns with a fresh one.

    Paper: FreezeOut: Accelerate Training by Progressively Freezing Layers (arXiv 1706.04983); LISA: Layerwise Importance
    Sampling for Memory-Efficient Large Language Model Fine-Tuning (arXiv 2403.17919; `random`). Departures: scores by gradient
    norm and by cost; LISA keeps embedding and head in training.
    """

    unsharded: ClassVar[str] = "it changes what trains during the run, and the states of a divided optimizer do not follow"
    stage: ClassVar[Stage] = Stage.FREEZE
    mergeable: ClassVar[bool] = True
    lifecycle_hooks: ClassVar[tuple[str, ...]] = ("before_step",)
    conflicts: ClassVar[dict[str, str]] = {
        "freeze": "one decides which blocks train; join their layers in one",
        "prefix_tuning": "its table feeds every block, so no block can rest on its own",
        "p_tuning_v2": "its table feeds every block, so no block can rest on its own",
        "apt": "its table feeds every block, so no block can rest on its own",
        "mam": "its table feeds every block, so no block can rest on its own",
        "unipelt": "its table feeds every block, so no block can rest on its own",
        "s4": "its table feeds every block, so no block can rest on its own",
        "autopeft": "its table feeds every block, so no block can rest on its own",
        "noah": "its table feeds every block, so no block can rest on its own",
        "prompt_tuning": "its tokens stand below every block, so no block could rest without cutting them off",
        "adalora": "it moves ranks between blocks by their gradients, and blocks at rest have none",
    }

    mode: Literal["static", "dynamic"] = "static"
    """static: `layers` rest for the whole run; dynamic: chosen again every `interval` steps."""
    layers: str | None = None
    """static: blocks at rest, a range such as `0:8` or `3|5`; default: the lower half."""
    score: Literal["grad_norm", "random", "cost"] = "grad_norm"
    """dynamic: which blocks train."""
    active: PositiveInt | None = None
    """dynamic: how many blocks are chosen; default: half of them."""
    interval: PositiveInt = 100
    """dynamic: steps between two choices."""
    contiguous: bool = True
    """dynamic: also train all blocks above the lowest chosen one."""
    decay: OpenFraction = 0.9
    """Decay of the running mean of |g|."""
    score_batches: PositiveInt = 4
    """Batches of the first measurement."""
    seed: NonNegativeInt = 0
    """Seed of `random`."""

    @functools.cached_property
    def _norms(self) -> BlockNorms:
        return BlockNorms(self.decay)

    @classmethod
    def reads_gradients(cls) -> bool:
        """Return False: only the scores of `dynamic` do (see `check_stack`)."""
        return False

    def _scored(self) -> bool:
        return self.mode == "dynamic" and self.score != "random"

    def check_stack(self, wrappers: Sequence[Wrapper]) -> None:
        """Refuse scores by gradient under a rule that makes none, and layers of a choice that is dynamic."""
        free = next((w.name for w in wrappers if w.gradient_free), None)
        if free and self._scored():
            raise RecipeError(f"stack.{self.name}.score: {self.score} works on gradients, and {free} makes none; use random")
        if self.mode == "dynamic" and self.layers is not None:
            raise RecipeError(f"stack.{self.name}.layers: dynamic chooses among all blocks; use mode: static, or leave it out")

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add nothing.

        Raises:
            ModelError: `layers` names no block, or more blocks are to be active than there are.
        """
        count = len(blocks_of(model))
        if self.mode == "static":
            self._resting_blocks(model)
        elif self.active is not None and self.active > count:
            raise ModelError(f"stack.{self.name}.active: {self.active} blocks of {count}; at most {count} can train")

    def _resting_blocks(self, model: nn.Module) -> set[int]:
        count = len(blocks_of(model))
        if self.mode == "static":
            return set(range(count // 2)) if self.layers is None else self._named_blocks(model, self.layers)
        return set() if self._norms.active is None else set(range(count)) - set(self._norms.active)

    def _named_blocks(self, model: nn.Module, layers: str) -> set[int]:
        blocks = blocks_of(model)
        try:
            return blocks.of(layers)
        except ModelError as error:
            raise ModelError(
                f"stack.{self.name}.layers: {layers!r} names no block; this model has {len(blocks)} of them, counted from 0 in "
                "each side; write one as '3', several as '3|5', a range without its end as '0:8'"
            ) from error

    def resting(self, model: nn.Module) -> set[str]:
        """Return every parameter of a block at rest; the embedding's too, unless the lowest block trains."""
        at_rest = self._resting_blocks(model)
        if not at_rest:
            return set()
        # The embedding is below block 0: its own place is -1.
        return {name for name, block in owners_of(model).items() if block in at_rest or (block == -1 and 0 in at_rest)}

    def calibrates(self) -> bool:
        """Return whether gradients are measured before step 0."""
        return self._scored()

    def calibrate(self, model: nn.Module, probe: Probe) -> None:
        """Measure |g| of every block."""
        if not self._scored():
            return
        for micros in probe.groups(self.score_batches):
            weights = [probe.weight(m) for m in micros] if probe.weight is not None else [1.0] * len(micros)
            for micro, weight in zip(micros, weights, strict=True):
                (probe.loss(micro) * (weight / max(sum(weights), 1e-12))).backward()
            self._norms.see(model, first=True)
            model.zero_grad(set_to_none=True)

    def before_step(self, model: nn.Module, step: int) -> bool | None:
        """Choose the blocks that train; True when they change."""
        if self.mode == "static" or step % self.interval:
            return False
        count = len(blocks_of(model))
        chosen = active_blocks(
            self.score, count, self.active or max(1, count // 2), self._norms.mean, self.contiguous, (self.seed, step)
        )
        changed = chosen != self._norms.active
        self._norms.active = chosen
        return changed

    def after_backward(self, model: nn.Module, step: int) -> None:
        """Follow |g| of the blocks that train."""
        if self._scored():
            self._norms.see(model)

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Return how many blocks train, and the lowest of them."""
        at_rest = self._resting_blocks(model)
        training = [i for i in range(len(blocks_of(model))) if i not in at_rest]
        return {"training_blocks": float(len(training)), "lowest_training": float(min(training, default=-1))}

    def merge(self, model: nn.Module) -> None:
        """Do nothing: weights are trained as they are."""

    def state(self) -> dict[str, Any]:
        """Return the chosen blocks and the running means."""
        return {"active": self._norms.active, "mean": self._norms.mean}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore them."""
        active, mean = state.get("active"), state.get("mean", [])
        self._norms.active = None if active is None else [stored_count(block, "a block") for block in active]
        self._norms.mean = [stored_number(value, "the mean of a block") for value in mean]

    def delta(self, model: nn.Module) -> dict[str, Tensor]:
        """Return nothing: what trained is saved by its own method, or with all weights."""
        return {}

    def describe(self, model: nn.Module) -> Iterator[tuple[str, int]]:
        """Yield how many numbers rest."""
        if self.mode == "static":
            parameters = dict(model.named_parameters())
            yield "numbers at rest", sum(parameters[name].numel() for name in self.resting(model))
