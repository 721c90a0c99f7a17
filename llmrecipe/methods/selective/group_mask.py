"""Structured selection: whole groups of weights train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from llmrecipe.errors import ModelError, RecipeError
from llmrecipe.fields import Annotated, Field, Literal, NonNegativeInt, PositiveInt
from llmrecipe.methods.sparse_wrapper import SparseHooks, attach_chosen, chosen_from
from llmrecipe.methods.wrapper import Probe, Stage, Wrapper
from llmrecipe.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmrecipe.methods.weight_groups import Family


@register
class GroupMask(SparseHooks, Wrapper):
    """Structured selection: train whole tensors, rows, columns, heads, neurons or layers; freeze the rest.

    S_j = sum_{i in j} score_i / |j|^p, p = 1 (`normalize: mean`) or 0 (`sum`); groups are taken in the order of S_j while the
    sum of their sizes stays within floor(density N). A row is an output feature with its bias, a column an input feature;
    a head is a key/value head with the query heads it serves (rows of q, k, v, columns of o); a neuron is a row of gate and
    up with its column of down. Gradients are dense products of the selected features only, dW_R = G_R^T X and
    dW_C = G^T X_C, so their cost falls with the density; columns keep only their features of X. Nothing is computed below
    the lowest selected layer. Starts at the base model; merging adds the deltas.

    Source: the efficient reading of structured diff pruning (arXiv 2012.07463), whose own groups only encourage zeros and
    stay entry-wise in the end; this card's hard selection is a product definition, no paper's method.
    """

    stage: ClassVar[Stage] = Stage.SELECT
    mergeable: ClassVar[bool] = True
    hooks: ClassVar[tuple[str, ...]] = ("after_step",)

    group: Literal["tensor", "row", "column", "head", "neuron", "layer"] = "row"
    """What is selected as a whole."""
    score: Literal["fisher", "taylor", "magnitude", "random"] = "fisher"
    """Squared gradients of examples, squared gradients of batches, |w|, or chance."""
    normalize: Literal["mean", "sum"] = "mean"
    """Mean or sum of a group's scores; sums favour large groups."""
    density: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    """Share of the numbers in all groups together."""
    min_per_layer: NonNegativeInt = 0
    """The best so many groups of every layer are taken first."""
    scope: str = ""
    """Tensors considered: a target or `blocks`. Default: all (tensor), the blocks (layer), their projections (others)."""
    num_samples: PositiveInt = 128
    """Examples (fisher) or batches (taylor) scored."""
    layer_groups: PositiveInt = 1
    """Score the model in this many passes for a buffer of that fraction."""
    remove: bool = False
    """Removing weights is another thing than training few of them: always refused."""
    seed: int = 0
    """Seed of random scores."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """A saved selection takes its place; a fresh one is chosen by `calibrate`.

        Raises:
            RecipeError: `remove` was asked for.
        """
        from llmrecipe.methods.weight_groups import families

        if self.remove:
            raise RecipeError(f"stack.{self.name}.remove: this method selects what trains and removes nothing; drop the key")
        if structure is not None:
            attach_chosen(model, self.name, chosen_from(structure))
        else:
            self.budget(families(model, self.group, self.scope))

    def plan(self, model: nn.Module) -> int:
        """At most so many numbers."""
        from llmrecipe.methods.weight_groups import families

        return self.budget(families(model, self.group, self.scope))

    def budget(self, found: list[Family]) -> int:
        """Numbers that may train.

        Raises:
            ModelError: not even the smallest group fits.
        """
        total = sum(f.count * f.size for f in found)
        budget = int(self.density * total)
        smallest = min(f.size for f in found)
        if budget < smallest:
            raise ModelError(
                f"stack.{self.name}.density: {self.density} of {total} numbers is {budget}, less than the smallest "
                f"{self.group} ({smallest}); raise it or choose a smaller group"
            )
        return budget

    def calibrate(self, model: nn.Module, probe: Probe) -> None:
        """Score the groups, take the best, inject their ports."""
        from llmrecipe.methods.weight_groups import chosen_of, families, pick

        found = families(model, self.group, self.scope)
        scores = self._scores(model, probe, found)
        if self.normalize == "mean":
            scores = [s / f.size for s, f in zip(scores, found, strict=True)]
        taken = pick(found, scores, self.budget(found), self.min_per_layer)
        attach_chosen(model, self.name, chosen_of(found, taken))

    def _scores(self, model: nn.Module, probe: Probe, found: list[Family]) -> list[Tensor]:
        """(groups,) summed scores of each family."""
        if self.score == "random":
            from llmrecipe.methods.counter import uniform

            # Times the size: chance decides between groups, not between sizes, once the mean is taken.
            return [uniform(f"{self.seed}:{f.name}", 0, f.count) * f.size for f in found]
        weights = {m.weight.name: m.weight for f in found for m in f.members}
        totals = [torch.zeros(f.count, dtype=torch.float64) for f in found]
        names = list(weights)
        size = -(-len(names) // self.layer_groups)
        for first in range(0, len(names), size):
            part = {name: weights[name] for name in names[first : first + size]}
            flat = self._entry_scores(model, probe, part)
            for total, family in zip(totals, found, strict=True):
                for member in family.members:
                    if member.weight.name in flat:
                        total += member.sums(flat[member.weight.name])
        return totals

    def _entry_scores(self, model: nn.Module, probe: Probe, part: dict[str, Any]) -> dict[str, Tensor]:
        from llmrecipe.methods import selection

        if self.score == "magnitude":
            if any(w.quantized for w in part.values()):
                raise ModelError(f"stack.{self.name}.score: magnitude reads weights, and some are quantized; use fisher")
            return {name: w.value.detach().float().abs().reshape(-1) for name, w in part.items()}
        if self.score == "fisher":
            return selection.score(model, probe, part, self.num_samples)
        return selection.score(model, probe, part, self.num_samples, rows=None, reduction="mean")
