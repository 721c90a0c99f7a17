"""Sparse matrix tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.option_types import Annotated, Field, Literal, PositiveFloat, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Probe, Stage, Wrapper
from llmrecipe.methods.memory._engines.matrix_units import (
    Unit,
    activation_scores,
    chosen_units,
    gradient_scores,
    unit_of,
)
from llmrecipe.methods.selective._engines.base_weight import Selected, Weight
from llmrecipe.methods.selective._engines.sparse_method import (
    SparseMethod,
    attach_chosen,
    base_weights,
    candidates,
    chosen_from,
)

if TYPE_CHECKING:
    from torch import Tensor, nn


@register
class Smt(SparseMethod, Wrapper):
    """SMT: W_ab <- W_ab + delta_ab at the l x l blocks (a, b) with the largest gradient; dW_ab = G[:, a]^T X[:, b] there alone.

    Before step 0 `warmup_steps` batches score every block of `target`; the best of all matrices together, within `budget`,
    train from delta = 0, so training starts at the base model. n blocks train n l^2 numbers, and gradients, optimizer state and
    the saved file have that size. The backward pass keeps a copy of the inputs that chosen blocks read, each column once.
    `granularity: channel` trains whole input channels, W[:, c], by default those with the largest activations, scored in
    forward passes. `threshold` takes every unit with a larger score instead of a budget. Attention and feed-forward have
    separate budgets as two entries of the stack. Merging W <- W + delta is exact in float32. Quantized weights are refused.

    Paper: Sparse Matrix in Large Language Model Fine-tuning (arXiv 2405.15525). Departures: weights stay as they are while
    scores are taken (its code trains everything for the first 100 steps, at the memory of full fine-tuning, and goes on from
    there); of the code's four scores of S = sum_t G_t the paper's mean |S| is the default; channels are columns of W (its code
    moves rows); columns are copied (its views keep the whole input).
    """

    unsharded: ClassVar[str] = "it changes what trains during the run, and the states of a divided optimizer do not follow"
    stage: ClassVar[Stage] = Stage.SELECT
    mergeable: ClassVar[bool] = True
    needs_gradients: ClassVar[str] = "chooses and trains blocks by gradients"
    lifecycle_hooks: ClassVar[tuple[str, ...]] = ("after_step",)

    granularity: Literal["block", "channel"] = "block"
    """What is chosen: l x l blocks, or input channels."""
    score: Literal["auto", "grad", "activation"] = "auto"
    """By gradients or by the layer's inputs; auto: grad for blocks, activation for channels."""
    reduce: Literal["abs_mean", "mean_abs", "l1", "l2", "stream"] = "abs_mean"
    """Score of a unit of S, the sum of gradients: mean |S|, |mean S|, sum |S|, root of sum S^2, or the mean of sum |G_t|."""
    block: PositiveInt = 256
    """l; a matrix with a shorter side has blocks of that side. Edge blocks hang over."""
    target: str = "attn.q|k|v"
    """Matrices that are candidates."""
    budget: PositiveFloat = 0.0084
    """Numbers that train: a count from 1 on, or below 1 a share of all numbers in the model's matrices."""
    threshold: PositiveFloat | Annotated[str, Field(pattern=r"^q0?\.\d+$")] | None = None
    """Take every unit with a larger score; `q0.99`: larger than 99 % of all units."""
    scope: Literal["global", "per_matrix"] = "global"
    """Whether all matrices share the budget, or each has its part."""
    warmup_steps: PositiveInt = 100
    """Batches that are scored, each row at most once."""

    def check_stack(self, wrappers: Sequence[Wrapper]) -> None:
        """Refuse a score that activations do not have."""
        if self._by() == "activation" and self.reduce not in ("abs_mean", "l2"):
            raise RecipeError(
                f"stack.{self.name}.reduce: activations have no sign and are no sum over batches; use abs_mean or l2, "
                f"or score: grad for {self.reduce}"
            )

    def _by(self) -> str:
        return self.score if self.score != "auto" else "grad" if self.granularity == "block" else "activation"

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Put a saved selection in its place; a fresh one is made by `calibrate`.

        Raises:
            ModelError: the target has no matrix that can train, or fewer numbers than the budget.
        """
        if structure is None:
            numbers = sum(w.numel for w in self._linear(base_weights(model, self.target)).values())
            if self.threshold is None and self._count(model) > numbers:
                raise ModelError(
                    f"stack.{self.name}.budget: {self.budget:g} stands for {self._count(model):,} numbers, and the matrices of "
                    f"'{self.target}' have {numbers:,}; lower it, or name more matrices in stack.{self.name}.target"
                )
        else:
            attach_chosen(model, self.name, chosen_from(structure))

    def _linear(self, weights: dict[str, Weight]) -> dict[str, Weight]:
        found = {name: w for name, w in weights.items() if len(w.shape) == 2}
        other = next((n for n, w in found.items() if isinstance(w.owners[0][0], torch.nn.Embedding)), None)
        if other or not found:
            raise ModelError(f"stack.{self.name}.target: {other or self.target} is no linear layer; name projections")
        return found

    def _count(self, model: nn.Module) -> int:
        if self.budget >= 1:
            return int(self.budget)
        return int(self.budget * sum(w.numel for w in base_weights(model).values() if len(w.shape) == 2))

    def plan(self, model: nn.Module) -> int:
        """Return the largest number of numbers that will train."""
        return self._count(model)

    def calibrate(self, model: nn.Module, probe: Probe) -> None:
        """Score the units and add hooks for the chosen ones."""
        weights = self._linear(candidates(model, self.target))
        units = {name: unit_of(w, self.granularity, self.block) for name, w in weights.items()}
        by = gradient_scores if self._by() == "grad" else activation_scores
        scores = by(model, probe, weights, units, self.reduce, self.warmup_steps)
        attach_chosen(model, self.name, self._chosen(model, scores, units))

    def _chosen(self, model: nn.Module, scores: dict[str, Tensor], units: dict[str, Unit]) -> dict[str, Selected]:
        threshold = self.threshold
        if isinstance(threshold, str):
            values = torch.cat([v.detach().double().cpu() for v in scores.values()]).sort().values
            threshold = float(values[max(0, math.ceil(float(threshold[1:]) * len(values)) - 1)])
        return chosen_units(scores, units, self._count(model), threshold, self.scope == "per_matrix")
