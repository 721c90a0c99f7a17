"""Units of matrices, blocks or input channels: their scores, and the choice of those that train.

With S the gradient of a matrix summed over batches, each score of a unit U is over the numbers of U inside the matrix:

    abs_mean   mean |S|          mean_abs   |mean S|          l1   sum |S|          l2   sqrt(sum S^2)
    stream     mean of the sum over batches of |G|

mean_abs and stream are added up unit by unit; the others need S itself, 4 bytes a candidate. Activations X (M, in) give an
input channel c the score mean_m |X[m, c]| (abs_mean), or sqrt(sum_t (sum over rows of |X[t, c]|)^2), t a place in a row (l2);
padding does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import current
from llmrecipe.methods._base.method import Probe
from llmrecipe.methods.selective._engines import selection
from llmrecipe.methods.selective._engines.base_weight import Selected, Weight, is_conv1d
from llmrecipe.methods.selective._engines.blocks import block_totals

if TYPE_CHECKING:
    from llmrecipe.methods._base.update_rule import Processes


@dataclass(frozen=True)
class Unit:
    """How one matrix is cut into units."""

    shape: tuple[int, ...]
    block: int
    """Side of a block; 0 for input channels."""
    transposed: bool
    """Whether inputs run along the rows of the stored matrix."""

    @property
    def layout(self) -> str:
        """Return the layout of a selection of units."""
        return f"blocks {self.block}" if self.block else "rows" if self.transposed else "columns"

    @property
    def cost(self) -> int:
        """Return how many numbers a unit trains."""
        return self.block**2 if self.block else self.shape[1 if self.transposed else 0]

    def sums(self, flat: Tensor) -> Tensor:
        """Return the sum of every unit of a flat matrix."""
        matrix = flat.view(self.shape)
        return block_totals(matrix, self.block) if self.block else matrix.sum(1 if self.transposed else 0)

    def sizes(self, like: Tensor) -> Tensor:
        """Return how many numbers of the matrix each unit has."""
        return self.sums(torch.ones(self.shape, dtype=like.dtype, device=like.device).flatten())

    def spread(self, inputs: Tensor) -> Tensor:
        """Return the score of each unit from one of every input: the mean over the inputs it reads."""
        matrix = inputs[:, None].expand(self.shape) if self.transposed else inputs.expand(self.shape)
        flat = matrix.reshape(-1)
        return self.sums(flat) / self.sizes(flat)


def unit_of(weight: Weight, granularity: str, block: int) -> Unit:
    """Return the units of a matrix; a block is no larger than its shorter side."""
    shape = weight.shape
    return Unit(shape, min(block, *shape) if granularity == "block" else 0, is_conv1d(weight.owners[0][0]))


def gradient_scores(
    model: nn.Module, probe: Probe, weights: Mapping[str, Weight], units: Mapping[str, Unit], reduce: str, batches: int
) -> dict[str, Tensor]:
    """Score units by gradients of the mean loss; weights stay as they are."""
    folds = reduce in ("mean_abs", "stream")
    totals = selection.score_entries(
        model,
        probe,
        weights,
        probe.count(batches),
        rows=None,
        power="absolute" if reduce == "stream" else "signed",
        reduction="mean",
        fold=(lambda name, flat: units[name].sums(flat)) if folds else None,
    )
    return {name: _reduced(total, units[name], reduce) for name, total in totals.items()}


def _reduced(total: Tensor, unit: Unit, reduce: str) -> Tensor:
    if reduce in ("mean_abs", "stream"):
        return total.abs() / unit.sizes(total)
    if reduce == "l2":
        return unit.sums(total.square()).sqrt()
    sums = unit.sums(total.abs())
    return sums if reduce == "l1" else sums / unit.sizes(total)


class ActivationSums:
    """Sums of |x| of the inputs of some linear layers, by place in a row where squares are wanted."""

    def __init__(self, by_place: bool):
        self.by_place = by_place
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, float] = {}

    def see(self, name: str, x: Tensor) -> None:
        """Add the inputs (R, T, in) of a call."""
        context = current()
        sizes = x.detach().float().abs()
        rows, columns = sizes.shape[:2]
        mask = context.attention_mask
        real = torch.ones(rows, columns, device=x.device)
        if context.layout is None and mask is not None and mask.shape == real.shape:
            real = mask.to(real.dtype)
        sizes = sizes * real[..., None]
        self.tokens[name] = self.tokens.get(name, 0.0) + float(real.sum())
        if not self.by_place:
            found = sizes.sum((0, 1))[None]
        else:
            own = context.positions
            known = own is not None and own.shape == real.shape
            place = own if known else torch.arange(columns, device=x.device).expand(rows, -1)
            assert place is not None
            found = sizes.new_zeros(int(place.max()) + 1, sizes.shape[-1])
            found.index_add_(0, place.reshape(-1), sizes.flatten(0, 1))
        before = self.sums.get(name, found.new_zeros(0, found.shape[1]))
        longer, shorter = (before, found) if before.shape[0] > found.shape[0] else (found, before)
        longer = longer.clone()
        longer[: shorter.shape[0]] += shorter
        self.sums[name] = longer

    def scores(self, world: Processes | None) -> dict[str, Tensor]:
        """Return one score for every input of each layer, the same on every process."""
        found = {}
        for name, sums in self.sums.items():
            tokens = torch.tensor([self.tokens[name]], dtype=torch.float64)
            if world is not None and world.world > 1:
                wide = int(world.maximum(torch.tensor([float(sums.shape[0])])))
                padded = torch.cat([sums, sums.new_zeros(wide - sums.shape[0], sums.shape[1])])
                sums, tokens = world.sum(padded.double()).to(sums), world.sum(tokens)
            found[name] = sums.square().sum(0).sqrt() if self.by_place else sums[0] / float(tokens)
        return found


@torch.no_grad()
def activation_scores(
    model: nn.Module, probe: Probe, weights: Mapping[str, Weight], units: Mapping[str, Unit], reduce: str, batches: int
) -> dict[str, Tensor]:
    """Score units by the inputs of their layers, in forward passes alone."""
    seen = ActivationSums(by_place=reduce == "l2")
    world, rank = getattr(probe.world, "world", 1), getattr(probe.world, "rank", 0)
    handles = [
        weight.owners[0][0].register_forward_pre_hook(lambda _, args, n=name: seen.see(n, args[0]), prepend=True)
        for name, weight in weights.items()
    ]
    try:
        with selection.mode(model, False):
            for index, micros in enumerate(probe.groups(probe.count(batches))):
                if index % world == rank:
                    for micro in micros:
                        probe.loss(micro)
    finally:
        for handle in handles:
            handle.remove()
    return {name: units[name].spread(inputs) for name, inputs in seen.scores(probe.world).items()}


def chosen_units(
    scores: Mapping[str, Tensor], units: Mapping[str, Unit], budget: int, threshold: float | None, per_matrix: bool
) -> dict[str, Selected]:
    """Return the units that train: the best within a budget of numbers, or all above a threshold.

    Args:
        per_matrix: every matrix has an equal share of the budget.

    Raises:
        ModelError: no unit is chosen, or a score is not a number.
    """
    flat = {name: value.detach().double().cpu() for name, value in scores.items()}
    if any(bool(torch.isnan(v).any()) for v in flat.values()):
        raise ModelError("a score is NaN: the loss or a gradient overflowed while scores were taken")
    if threshold is not None:
        found = {name: (value > threshold).nonzero().squeeze(1) for name, value in flat.items()}
    elif per_matrix:
        share = budget // len(flat)
        found = {name: _best({name: value}, units, share)[name] for name, value in flat.items()}
    else:
        found = _best(flat, units, budget)
    chosen = {name: Selected(idx, units[name].layout) for name, idx in found.items() if idx.numel()}
    if not chosen:
        if threshold is not None:
            largest = max(float(value.max()) for value in flat.values())
            raise ModelError(f"no unit has a score above the threshold {threshold:g} (the largest is {largest:g})")
        least = min(unit.cost for unit in units.values())
        raise ModelError(f"a budget of {budget} numbers, and the smallest unit has {least}; give more, or smaller blocks")
    return chosen


def _best(scores: Mapping[str, Tensor], units: Mapping[str, Unit], budget: int) -> dict[str, Tensor]:
    """Return the best units, in the order of their scores until one does not fit; ties go to the earlier unit."""
    names = list(scores)
    values = torch.cat([scores[n] for n in names])
    costs = torch.cat([torch.full((scores[n].numel(),), units[n].cost) for n in names])
    order = values.argsort(descending=True, stable=True)
    fits = costs[order].cumsum(0) <= budget
    kept = torch.zeros(len(values), dtype=torch.bool)
    kept[order[fits]] = True
    parts = kept.split([scores[n].numel() for n in names])
    return {n: part.nonzero().squeeze(1) for n, part in zip(names, parts, strict=True)}
