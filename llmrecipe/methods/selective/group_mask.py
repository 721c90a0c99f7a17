"""Structured selection: whole groups of weights train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.option_types import Annotated, Field, Literal, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Probe, Stage, Wrapper
from llmrecipe.methods.selective._engines import selection
from llmrecipe.methods.selective._engines.counter_rng import uniform
from llmrecipe.methods.selective._engines.hard_concrete import GroupGate
from llmrecipe.methods.selective._engines.l0_phase import GatePhase
from llmrecipe.methods.selective._engines.sparse_method import attach_chosen, chosen_from
from llmrecipe.methods.selective._engines.weight_groups import chosen_of, families, pick

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmrecipe.methods.selective._engines.base_weight import Selected
    from llmrecipe.methods.selective._engines.hard_concrete import GroupGate
    from llmrecipe.methods.selective._engines.weight_groups import GroupFamily

GATED = ("l0_steps", "l0", "l0_per_parameter", "l0_warmup", "low", "high", "alpha_init", "w_lr_scale", "alpha_lr_scale")
"""Options that only `hard_l0: true` reads."""
SCORED = ("score", "num_samples", "layer_groups")
"""Options that it does not read."""


@register
class GroupMask(GatePhase, Wrapper):
    """Structured selection: train whole tensors, rows, columns, heads, neurons or layers; freeze the rest.

    S_j = sum_{i in j} score_i / |j|^p, p = 1 (`normalize: mean`) or 0 (`sum`); groups are taken in the order of S_j while the
    sum of their sizes stays within floor(density N). A row is an output feature with its bias, a column an input feature;
    a head is a key/value head with the query heads it serves (rows of q, k, v, columns of o); a neuron is a row of gate and
    up with its column of down. Gradients are dense products of the selected features only, dW_R = G_R^T X and
    dW_C = G^T X_C, so their cost falls with the density; columns keep only their features of X. Nothing is computed below
    the lowest selected layer. Starts at the base model; merging adds the deltas.

    `hard_l0: true` learns the choice. Phase 1 (steps 0 to l0_steps): every weight of the groups has a difference w, every group
    j one hard-concrete gate, delta_i = z_j w_i, z_j = min(1, max(0, s (high - low) + low)), s = sigma(logit u + alpha_j), one
    draw of u a step. The loss gains l0 * E ||delta||_0 = l0 * sum_j |j| sigma(alpha_j - ln(-low / high)). Then u is drawn once,
    score_i = delta_i^2 takes the place of `score`, and the groups within the budget train on from their w with z = 1. Trained
    in phase 1: the numbers in all groups and a gate a group, at the rates of `diff_pruning`; evaluation takes the gates at
    u = 1/2. It needs unquantized tensors; merging is possible after phase 1.

    Source: the efficient reading of structured diff pruning (arXiv 2012.07463), whose own groups only encourage zeros and
    stay entry-wise in the end; the hard selection, with or without gates, is a product definition, no paper's method.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1",)
    unsharded: ClassVar[str] = "it writes into weights of which each process holds a part"
    stage: ClassVar[Stage] = Stage.SELECT
    mergeable: ClassVar[bool] = True
    needs_gradients: ClassVar[str] = "chooses groups by squared gradients, or learns gates by them"
    lifecycle_hooks: ClassVar[tuple[str, ...]] = ("before_step", "after_step")

    group: Literal["tensor", "row", "column", "head", "neuron", "layer"] = "row"  # type: ignore[misc]
    """What is selected as a whole."""
    score: Literal["fisher", "taylor", "magnitude", "random"] = "fisher"
    """Squared gradients of examples, squared gradients of batches, |w|, or chance."""
    normalize: Literal["mean", "sum"] = "mean"
    """Mean or sum of a group's scores; sums favour large groups."""
    density: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    """Share of the numbers in all groups together."""
    min_per_layer: NonNegativeInt = 0
    """This many of the best groups of every layer are chosen first."""
    scope: str = ""
    """Tensors considered: a target or `blocks`. Default: all (tensor), the blocks (layer), their projections (others)."""
    num_samples: PositiveInt = 128
    """Examples (fisher) or batches (taylor) scored."""
    layer_groups: PositiveInt = 1
    """Score the model in this many passes for a buffer of that fraction."""
    remove: bool = False
    """Removing weights is another thing than training few of them: always refused."""
    seed: int = 0
    """Seed of random scores and of u."""
    hard_l0: bool = False
    """Learn which groups to take, under an L0 penalty, instead of scoring them before step 0."""
    l0_steps: PositiveInt = 1000
    """hard_l0: optimizer steps of phase 1; in the rest of the run the chosen groups train."""
    l0: NonNegativeFloat = 1.25e-7
    """hard_l0: weight of the expected number of changed weights. It is a sum: compare l0 times their number with the loss."""
    l0_per_parameter: bool = False
    """hard_l0: divide the penalty by the number of weights, so that l0 does not depend on the model's size."""
    l0_warmup: NonNegativeInt = 0
    """hard_l0: steps over which l0 grows from zero."""
    low: Annotated[float, Field(lt=0.0)] = -1.5
    """hard_l0: lower end of the stretched gate."""
    high: Annotated[float, Field(gt=1.0)] = 1.5
    """hard_l0: upper end of the stretched gate."""
    alpha_init: float = 5.0
    """hard_l0: start of the gates' logits; P(z > 0) = 0.993."""
    w_lr_scale: PositiveFloat = 0.2
    """hard_l0: learning rate of w over optim.lr."""
    alpha_lr_scale: PositiveFloat = 2000.0
    """hard_l0: learning rate of the gates over optim.lr."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Put a saved selection in its place, or gates in phase 1 of `hard_l0`; a fresh one is chosen by `calibrate`.

        Raises:
            RecipeError: `remove` was set, or an option is set that this choice of `hard_l0` does not read.
            ModelError: not even one group fits the budget, or gates meet a quantized tensor.
        """
        self._refuse()
        if structure is not None and structure.get("phase") != "l0":
            attach_chosen(model, self.name, chosen_from(structure))
            return
        found = families(model, self.group, self.scope)
        self.budget(found)
        if self.hard_l0:
            self._gate(model, found)

    def _refuse(self) -> None:
        if self.remove:
            raise RecipeError(f"stack.{self.name}.remove: this method selects what trains and removes nothing; drop the key")
        options = type(self).__dataclass_fields__
        for key in SCORED if self.hard_l0 else GATED:
            given = getattr(self, key)
            if given != options[key].default:
                why = "hard_l0: true chooses by learned differences" if self.hard_l0 else "only hard_l0: true reads it"
                raise RecipeError(f"stack.{self.name}.{key}: {given} has no effect: {why}; drop the key or change hard_l0")

    def _gate(self, model: nn.Module, found: list[GroupFamily]) -> None:
        for family in found:
            first = None
            for member in family.members:
                hook = GroupGate(family, member, self.low, self.high, self.alpha_init, first)
                self.add_gates(member.weight, hook)
                first = first or hook
        self.aim(model, 0)

    def penalizes(self) -> bool:
        """Return whether a penalty applies: only learned choices have one."""
        return self.hard_l0

    def expected(self, hooks: list[GroupGate]) -> Tensor | float:
        """Return E ||delta||_0, family by family."""
        total: Tensor | float = 0.0
        for hook in hooks:
            if hook.alpha is not None:
                total = total + hook.expected()
        return total

    def survivors(self, model: nn.Module, hooks: list[GroupGate], draw: str) -> dict[str, Selected]:
        """Return the groups with the largest delta^2."""
        found = families(model, self.group, self.scope)
        differences = {hook.source: hook for hook in hooks}
        scores = [torch.zeros(f.count, dtype=torch.float64) for f in found]
        for total, family in zip(scores, found, strict=True):
            for member in family.members:
                total += member.sums(differences[member.weight.name].difference(draw).square_())
        return self._best(found, scores)

    def plan(self, model: nn.Module) -> int:
        """Return the largest number of entries that will train."""
        return self.budget(families(model, self.group, self.scope))

    def budget(self, found: list[GroupFamily]) -> int:
        """Return the numbers that may train.

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
        """Score the groups, choose the best, add their hooks; `hard_l0` chooses later."""
        if not self.hard_l0:
            found = families(model, self.group, self.scope)
            attach_chosen(model, self.name, self._best(found, self._scores(model, probe, found)))

    def _best(self, found: list[GroupFamily], scores: list[Tensor]) -> dict[str, Selected]:
        """Return the best groups within the budget; `scores` are (groups,) sums of each family."""
        if self.normalize == "mean":
            scores = [s / f.size for s, f in zip(scores, found, strict=True)]
        return chosen_of(found, pick(found, scores, self.budget(found), self.min_per_layer))

    def _scores(self, model: nn.Module, probe: Probe, found: list[GroupFamily]) -> list[Tensor]:
        """Return summed scores (groups,) of each family."""
        if self.score == "random":
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
        if self.score == "magnitude":
            if any(w.quantized for w in part.values()):
                raise ModelError(f"stack.{self.name}.score: magnitude reads weights, and some are quantized; use fisher")
            return {name: w.value.detach().float().abs().reshape(-1) for name, w in part.items()}
        if self.score == "fisher":
            return selection.score_entries(model, probe, part, self.num_samples)
        return selection.score_entries(model, probe, part, self.num_samples, rows=None, reduction="mean")
