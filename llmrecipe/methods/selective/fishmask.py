"""FishMask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.errors import ModelError
from llmrecipe.core.option_types import Annotated, Field, Literal, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Probe, Stage, Wrapper
from llmrecipe.methods.selective._engines import selection
from llmrecipe.methods.selective._engines.base_weight import Selected
from llmrecipe.methods.selective._engines.counter_rng import uniform
from llmrecipe.methods.selective._engines.sparse_method import (
    SparseMethod,
    attach_chosen,
    base_weights,
    candidates,
    chosen_from,
)
from llmrecipe.models.task_heads import is_head

if TYPE_CHECKING:
    from torch import nn


@register
class Fishmask(SparseMethod, Wrapper):
    """FishMask: train the entries with the largest empirical Fisher information, chosen once, before step 0.

    F_i = sum_n (d log p(y_n | x_n) / d theta_i)^2 over `num_samples` examples, one backward pass each; the mask is the top
    k = floor(density N) of all N candidate entries at once, not of each layer. Selected entries train as float32 deltas on the
    sparse-delta engine: everything else stays bit-equal under any optimizer and weight decay, and optimizer state and
    checkpoint hold k numbers. Starts at the base model. Merging adds the deltas (exact in float32, one rounding below).

    Paper: Training Neural Networks with Fixed Sparse Masks (arXiv 2111.09839). Departures: a new task head trains in full
    outside the budget (`budget: with_head` counts it inside, as the reference code does); scores are taken in evaluation
    mode; log p(y|x) is summed over target tokens (`reduction: mean` would weigh an example of T targets by 1 / T^2).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1",)
    unsharded: ClassVar[str] = "it writes into weights of which each process holds a part"
    stage: ClassVar[Stage] = Stage.SELECT
    mergeable: ClassVar[bool] = True
    needs_gradients: ClassVar[str] = "chooses entries by squared gradients"
    lifecycle_hooks: ClassVar[tuple[str, ...]] = ("after_step",)

    density: Annotated[float, Field(gt=0.0, le=1.0)] = 0.005
    """Share of the candidate entries that trains."""
    score: Literal["fisher", "random"] = "fisher"
    """What the mask is the top of: Fisher information, or chance, the paper's control (no example is read)."""
    num_samples: PositiveInt = 1024
    """Examples scored; each costs one forward and one backward pass."""
    sample_type: Literal["label", "expect"] = "label"
    """y of the data, or an expectation under the model: all classes by probability, or tokens drawn `draws` times."""
    draws: PositiveInt = 1
    """Samples of y an example, with expect on a language model."""
    grad_type: Literal["square", "absolute"] = "square"
    """Power of the gradient that is summed."""
    reduction: Literal["sum", "mean"] = "sum"
    """Whether the score is of log p(y|x) or of the mean loss."""
    budget: Literal["base", "with_head"] = "base"
    """Whether a new task head's numbers come out of k."""
    scope: str = "all"
    """Candidates: `all` base tensors, `blocks`, or a target."""
    eval_mode: bool = True
    """Score without dropout."""
    score_device: Literal["auto", "cpu"] = "auto"
    """Where the 4 bytes a candidate are kept while scoring."""
    layer_groups: PositiveInt = 1
    """Score the model in this many parts, one pass each, for a buffer of that fraction."""
    seed: int = 0
    """Seed of sampled targets and of a random mask."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Put a saved mask in its place; a fresh one is chosen by `calibrate`."""
        if structure is not None:
            attach_chosen(model, self.name, chosen_from(structure))
        else:
            self.count(model)

    def plan(self, model: nn.Module) -> int:
        """Return k."""
        return self.count(model)

    def count(self, model: nn.Module) -> int:
        """Return k, from the density.

        Raises:
            ModelError: nothing is left for the base.
        """
        total = sum(w.numel for w in base_weights(model, self.scope).values())
        k = int(self.density * total)
        if self.budget == "with_head":
            k -= sum(p.numel() for n, p in model.named_parameters() if is_head(model, n))
        if k < 1:
            raise ModelError(f"stack.{self.name}.density: {self.density} of {total} entries leaves none to train")
        return k

    def calibrate(self, model: nn.Module, probe: Probe) -> None:
        """Score, take the top k, add their hooks."""
        targets = selection.sampled_targets(probe.engine, self.draws, self.seed) if self.sample_type == "expect" else None

        def scorer(group: dict[str, Any]) -> dict[str, Any]:
            if self.score == "random":
                return {name: uniform(f"{self.seed}:{name}", 0, weight.numel) for name, weight in group.items()}
            return selection.score_entries(
                model,
                probe,
                group,
                self.num_samples,
                power=self.grad_type,
                reduction=self.reduction,
                training=not self.eval_mode,
                device=self.score_device,
                targets=targets,
            )

        best = selection.select_top(candidates(model, self.scope), self.count(model), self.layer_groups, scorer)
        attach_chosen(model, self.name, {name: Selected(idx) for name, idx in best.items()})
