"""Sensitivity-aware parameter-efficient tuning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.errors import ModelError
from llmrecipe.core.option_types import Literal, OpenFraction, PositiveFloat, PositiveInt, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Probe, Stage, Wrapper
from llmrecipe.methods._engines.low_rank import LowRank
from llmrecipe.methods.selective._engines import selection
from llmrecipe.methods.selective._engines.base_weight import Selected
from llmrecipe.methods.selective._engines.sparse_method import (
    SparseMethod,
    attach_chosen,
    base_weights,
    chosen_from,
    sparse_hooks,
)
from llmrecipe.methods.selective._engines.spt_allocation import SequentialAdapter, Tunable, add_structured, allocate
from llmrecipe.methods.selective._engines.top_k import pattern
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.module_map import anatomy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmrecipe.methods.selective._engines.spt_allocation import Allocation, Tunable
    from llmrecipe.models.site import Site


@register
class Spt(SparseMethod, Wrapper):
    """SPT: sensitivity decides, under one budget, which matrices get a LoRA or an adapter and which single entries train.

    Tuning entry n alone lowers the loss by about g_n dw_n, and dw_n = -e g_n, hence s_n = g_n^2, summed over batches. The
    tau most sensitive entries are taken of all candidates together. A matrix (o, i) that holds c >= P / matrix_ratio of them
    gets a structured module of P numbers, P = r (i + o) for LoRA (y + B A x, B = 0) or 2 o r + r + o for an adapter
    (y + W_u GELU(W_d y), W_u = 0); else just those entries train. A vector of size v with c >= v / vector_ratio trains whole.
    tau is the largest whose total (structured + vectors + entries) is within the budget. Candidates: projections, norms and
    biases; embeddings are frozen, a new task head trains in full outside the budget. Starts at the base model. LoRA, entries
    and vectors merge; adapters do not. Entries stand on the sparse-delta engine, so a matrix costs what it counts.

    Paper: Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning (arXiv 2303.08566). Departures: tau by bisection instead of
    a sweep, and the total never exceeds the budget; entries of norms really train; no drop path.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1",)
    unsharded: ClassVar[str] = "it writes into weights of which each process holds a part"
    stage: ClassVar[Stage] = Stage.SELECT
    mergeable: ClassVar[bool] = True
    needs_gradients: ClassVar[str] = "chooses entries and sites by gradients"
    lifecycle_hooks: ClassVar[tuple[str, ...]] = ("after_step",)

    budget: PositiveFloat = 0.005
    """Numbers that may train: a count from 1 on, or below 1 a share of the candidates."""
    structured: Literal["lora", "adapter"] = "lora"
    """What a sensitive matrix gets."""
    r: Rank = 8
    """Rank of the LoRA, width of the adapter."""
    matrix_ratio: PositiveFloat = 10.0
    """A matrix becomes structured from P / matrix_ratio sensitive entries on."""
    vector_ratio: PositiveFloat = 5.0
    """A vector trains whole from v / vector_ratio sensitive entries on."""
    structured_vector: bool = True
    """Whether vectors may train whole."""
    structured_only: bool = False
    """Leave single entries out."""
    num_batches: PositiveInt = 16
    """Batches scored."""
    batch_size: PositiveInt = 32
    """Rows in each of them."""
    per_example: bool = False
    """Square the gradient of each row instead of each batch's."""
    eval_mode: bool = False
    """Score without dropout."""
    dropout: OpenFraction = 0.1
    """Dropout of structured modules while training."""
    layer_groups: PositiveInt = 1
    """Score the model in this many passes for a buffer of that fraction (the scores themselves stay on the CPU)."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Put a saved allocation in its place; a fresh one is made by `calibrate`.

        Raises:
            ModelError: the budget is less than one number.
        """
        if structure is None:
            self.limit(self._tunables(model))
            return
        self._modules(model, structure["structured"])
        attach_chosen(model, self.name, chosen_from(structure))

    def _tunables(self, model: nn.Module) -> list[Tunable]:
        """Return candidates: matrices of projections, and the one-dimensional tensors of the blocks and the final norm."""
        matrices = {id(site.module.weight): site for site in _projections(model)}
        found = []
        for name, weight in base_weights(model).items():
            site = matrices.get(id(weight.value))
            if site is not None:
                i, o = site.width_in, site.width_out
                cost = self.r * (i + o) if self.structured == "lora" else 2 * o * self.r + self.r + o
                found.append(Tunable(name, weight.numel, cost, cost / self.matrix_ratio, site.path))
            elif len(weight.shape) == 1:
                whole = weight.numel / self.vector_ratio if self.structured_vector else float("inf")
                found.append(Tunable(name, weight.numel, weight.numel, whole))
        return found

    def plan(self, model: nn.Module) -> int:
        """Return the largest number of numbers that will train, in any form."""
        return 0 if self._structured(model) else self.limit(self._tunables(model))

    def limit(self, tunables: list[Tunable]) -> int:
        """Return the budget as a count.

        Raises:
            ModelError: it is less than one number.
        """
        total = sum(t.size for t in tunables)
        count = int(self.budget if self.budget >= 1 else self.budget * total)
        if count < 1:
            raise ModelError(f"stack.{self.name}.budget: {self.budget} of {total} candidates leaves nothing to train")
        return count

    def calibrate(self, model: nn.Module, probe: Probe) -> None:
        """Score the candidates, allocate the budget, add hooks for what was chosen."""
        tunables = self._tunables(model)
        scores = self._scores(model, probe, [t.name for t in tunables])
        keys = [pattern(scores[t.name]) for t in tunables]
        self._add_hooks(model, allocate(tunables, keys, self.limit(tunables), self.structured_only))

    def _scores(self, model: nn.Module, probe: Probe, names: list[str]) -> dict[str, Tensor]:
        weights = base_weights(model)
        rows = 1 if self.per_example else self.batch_size
        batches = self.num_batches * (self.batch_size if self.per_example else 1)
        size = -(-len(names) // self.layer_groups)
        found: dict[str, Tensor] = {}
        for first in range(0, len(names), size):
            part = {name: weights[name] for name in names[first : first + size]}
            totals = selection.score_entries(
                model, probe, part, batches, rows=rows, reduction="mean", training=not self.eval_mode,
            )  # fmt: skip
            found |= totals if self.layer_groups == 1 else {name: value.cpu() for name, value in totals.items()}
        return found

    def _add_hooks(self, model: nn.Module, allocation: Allocation) -> None:
        self._modules(model, allocation.structured)
        attach_chosen(model, self.name, {name: Selected(idx) for name, idx in allocation.entries.items()})

    def _modules(self, model: nn.Module, paths: list[str]) -> None:
        sites = {site.path: site for site in _projections(model)}
        for path in paths:
            add_structured(sites[path], self.name, self.structured, self.r, self.dropout)

    def structure(self, model: nn.Module) -> dict[str, Any]:
        """Return the allocation: structured modules by path, and the shapes of the selection."""
        return {"structured": self._structured(model), **super().structure(model)}

    def _structured(self, model: nn.Module) -> list[str]:
        return [path for path, _, _, p in all_hooks(model, self.name) if isinstance(p, LowRank | SequentialAdapter)]

    def merge(self, model: nn.Module) -> None:
        """Set W <- W + B A and W <- W + delta.

        Raises:
            ModelError: an adapter was allocated; it is not linear.
        """
        if self.structured == "adapter" and self._structured(model):
            raise ModelError(
                f"stack.{self.name}: an adapter is not linear and cannot be merged; export it separately from the model"
            )
        super().merge(model)

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: 20 bytes an entry, 16 a number of a structured module."""
        facts = super().memory(model)
        dense = self._dense(model)
        for key, size in (("trainable", 1), ("optimizer_bytes", 8), ("gradient_bytes", 4)):
            facts[key] += size * dense
        return facts

    def _dense(self, model: nn.Module) -> int:
        selected = {id(hook) for _, _, hook in sparse_hooks(model, self.name)}
        return sum(
            p.numel() for _, _, _, hook in all_hooks(model, self.name) if id(hook) not in selected for p in hook.parameters()
        )

    def describe(self, model: nn.Module) -> Iterator[tuple[str, int]]:
        """Yield structured modules, then selections."""
        for path in self._structured(model):
            hook = getattr(model.get_submodule(path), self.name)
            yield f"{path} ({self.structured})", sum(p.numel() for p in hook.parameters())
        yield from super().describe(model)


def _projections(model: nn.Module) -> list[Site]:
    return anatomy(model).at("all-linear")
