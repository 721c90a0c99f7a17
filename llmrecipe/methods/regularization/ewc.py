"""Elastic weight consolidation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.option_types import Literal, NonNegativeFloat, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Probe, Stage, Wrapper
from llmrecipe.methods.regularization._engines.anchors import (
    AnchorMethod,
    anchored,
    anchors_of,
    held_values,
    place_anchors,
    quadratic,
    total,
)
from llmrecipe.methods.selective._engines import selection
from llmrecipe.methods.selective._engines.sparse_method import base_weights

if TYPE_CHECKING:
    from torch import Tensor, nn


@register
class Ewc(AnchorMethod, Wrapper):
    """Elastic weight consolidation: L = loss + strength/2 sum_i F_i (w_i - w_0i)^2; what the old task needs is held.

    F_i = (1/T) sum_n (d log p(y_n | x_n) / d w_i)^2 is the diagonal of the Fisher information at the start w_0, over the rows
    x_n of the old task and their T targets, so that it stands in the units of a mean loss per target: to second order
    1/2 sum_i F_i (w_i - w_0i)^2 is KL(p_0 || p) a target on those rows. It is measured once, before step 0, one backward pass a
    row. A new task head is free. Starts at the base model, and the result is a plain model. w_0 takes the bytes of the
    checkpoint, F 4 bytes a weight; checkpoints hold F, the result does not.

    Paper: Overcoming catastrophic forgetting in neural networks (arXiv 1612.00796). Departures: one old task, the weights a run
    starts from; y_n is drawn from the model, as the definition of the Fisher information says (`sample_type: label` takes the
    targets of the data, the empirical Fisher information). The loss must be a negative log-likelihood.
    """

    stage: ClassVar[Stage] = Stage.ANCHOR
    mergeable: ClassVar[bool] = True
    shards: ClassVar[tuple[str, ...]] = ("zero1",)
    unsharded: ClassVar[str] = "it compares whole weights with where they started, and each process holds a part of them"
    lifecycle_hooks: ClassVar[tuple[str, ...]] = ("penalty",)
    needs_base: ClassVar[str] = "pulls the weights of the base back to where they started"
    needs_gradients: ClassVar[str] = "weighs entries by squared gradients"

    strength: NonNegativeFloat = 1.0
    """The paper's lambda; 1 adds the divergence on the old rows itself."""
    data: str | None = None
    """Rows of the old task, in a form that the objective reads; default: the run's own, with what the base answers to them."""
    num_samples: PositiveInt = 256
    """Rows measured; each costs one forward and one backward pass."""
    sample_type: Literal["label", "expect"] = "expect"
    """y of the data, or an expectation under the model: all classes by probability, or tokens drawn `draws` times."""
    draws: PositiveInt = 1
    """Samples of y a row, with expect on a language model."""
    seed: int = 0
    """Seed of drawn targets."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Copy the weights of the base, and make room for the Fisher information."""
        place_anchors(model, self.name, factors=True)

    def calibration_data(self) -> str | None:
        """Return where the old rows are."""
        return self.data

    def chooses(self) -> bool:
        """Return False: F says how strongly weights are held, not which train."""
        return False

    def calibrate(self, model: nn.Module, probe: Probe) -> None:
        """Measure F on the old rows."""
        probe = probe if self.data is None else probe.of(self.data)
        targets = selection.sampled_targets(probe.engine, self.draws, self.seed) if self.sample_type == "expect" else None
        factors = self.training_tensors(model)
        weights = {name: weight for name, weight in base_weights(model).items() if name in factors}
        scores = selection.score_entries(model, probe, weights, self.num_samples, targets=targets)
        count = sum(float(probe.weight(micro)) for micros in probe.groups(self.num_samples, 1) for micro in micros)
        for name, value in scores.items():
            factors[name].copy_(value.reshape(factors[name].shape)).div_(count)

    def penalty(self, model: nn.Module) -> Tensor | float:
        """Return strength/2 sum_i F_i (w_i - w_0i)^2."""
        value = self.strength * total([quadratic(*part) for part in anchored(model, self.name)])
        self.note(model, value)
        return value

    def training_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return F by name of the weight."""
        anchors = anchors_of(model, self.name)
        return held_values(anchors.factor) if anchors else {}
