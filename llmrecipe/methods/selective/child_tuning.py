"""Child-tuning, task-free (F) and task-driven (D)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from llmrecipe.core.errors import ModelError
from llmrecipe.core.option_types import Annotated, Field, Literal, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Probe, Stage, Wrapper
from llmrecipe.methods.selective._engines import selection
from llmrecipe.methods.selective._engines.base_weight import Selected
from llmrecipe.methods.selective._engines.counter_rng import bernoulli
from llmrecipe.methods.selective._engines.sparse_method import (
    SparseMethod,
    attach_chosen,
    base_weights,
    candidates,
    chosen_from,
)

if TYPE_CHECKING:
    from torch import nn

CHUNK = 1 << 22
COMPAT_CLIP = 1.0


@register
class ChildTuning(SparseMethod, Wrapper):
    """Child-tuning: only a child network's gradients are used.

    Variant f: at every step M_t ~ Bernoulli(p), g_t <- g_t * M_t / p, then the optimizer. Every weight trains; this is
    regularised full fine-tuning, not a small adapter: checkpoints hold the whole model. A masked entry still moves by momentum
    and decay, as in the paper's code; `mask_target: update` holds it still instead (at the price of a copy of the weights).
    Under Adam the factor 1 / p cancels. The mask is a function of seed, step, tensor and position, hence equal on every
    process and after a resume, and never stored.

    Variant d: the p largest entries of the Fisher information F_i = (1 / |D|) sum_j (d log p(y_j | x_j) / d theta_i)^2 of
    the blocks, chosen once; they train on the sparse-delta engine, everything outside the blocks trains in full
    (`rest: train`) or not at all. Masked entries never move. Merging adds the deltas.

    Paper: Raise a Child in Large Language Model (arXiv 2109.05687). Departures: d takes the gradient of each example, in
    evaluation mode (`code_compat` follows the authors' code: clipped gradients of batches, dropout on); exactly k entries are
    chosen where many are equal; masked entries of d do not decay.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1",)
    unsharded: ClassVar[str] = "it writes into weights of which each process holds a part"
    stage: ClassVar[Stage] = Stage.SELECT
    mergeable: ClassVar[bool] = True
    lifecycle_hooks: ClassVar[tuple[str, ...]] = ("after_backward", "after_step")
    needs_gradients: ClassVar[str] = "masks gradients, or chooses entries by them"

    variant: Literal["f", "d"] = "d"
    """f: a fresh random mask each step; d: one Fisher mask for the run."""
    p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """Share of entries in the child network."""
    scope: str = ""
    """Masked tensors: `all` (default of f), `blocks` (of d), a target, or (f) `trainable`: what other methods train."""
    rest: Literal["train", "freeze"] = "train"
    """d: what tensors outside the scope do."""
    mask_target: Literal["gradient", "update"] = "gradient"
    """f: mask gradients (momentum still moves masked entries), or let masked entries keep their value in that step."""
    num_samples: PositiveInt | None = None
    """d: examples scored; default: every training row."""
    code_compat: bool = False
    """d: score as the authors' code does."""
    layer_groups: PositiveInt = 1
    """d: score the model in this many passes for a buffer of that fraction."""
    seed: int = 0
    """f: seed of the masks."""

    def _scope(self) -> str:
        return self.scope or ("all" if self.variant == "f" else "blocks")

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Put a saved mask of variant d in its place.

        Raises:
            ModelError: variant f on quantized weights, which cannot train in full.
        """
        if self.variant == "d" and structure is not None:
            attach_chosen(model, self.name, chosen_from(structure))
        if self.variant == "f" and self._scope() != "trainable" and any(w.quantized for w in self._masked(model).values()):
            raise ModelError(f"stack.{self.name}: variant f trains every weight, and quantized weights cannot; use variant=d")

    def plan(self, model: nn.Module) -> int:
        """Return the p of the scope that d will choose."""
        return 0 if self.variant == "f" else int(self.p * sum(w.numel for w in self._masked(model).values()))

    def _masked(self, model: nn.Module) -> dict[str, Any]:
        return base_weights(model, self._scope())

    def opened(self, model: nn.Module) -> set[str]:
        """Return the entire scope for f; for d what is outside it."""
        if self.variant == "f":
            return set() if self._scope() == "trainable" else set(self._masked(model))
        if self.rest == "freeze":
            return set()
        return {name for name, w in base_weights(model).items() if not w.quantized} - set(self._masked(model))

    def calibrate(self, model: nn.Module, probe: Probe) -> None:
        """Score the scope and choose its top p, for d."""
        if self.variant == "f":
            return

        weights = candidates(model, self._scope())
        examples = self.num_samples or probe.rows
        compat: dict[str, Any] = {"rows": None, "reduction": "mean", "training": True, "clip": COMPAT_CLIP}

        def scorer(group: dict[str, Any]) -> dict[str, Tensor]:
            return selection.score_entries(model, probe, group, examples, **(compat if self.code_compat else {}))

        best = selection.select_top(weights, self.plan(model), self.layer_groups, scorer)
        attach_chosen(model, self.name, {name: Selected(idx) for name, idx in best.items()})

    def _gradients(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        names = None if self._scope() == "trainable" else self.opened(model)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and (names is None or name in names):
                yield name, parameter

    @torch.no_grad()
    def after_backward(self, model: nn.Module, step: int) -> None:
        """Set g <- g * M / p, for f, after clipping and after processes have summed their gradients."""
        if self.variant == "d":
            super().after_backward(model, step)
            return
        kept = _kept(model, self.name)
        for name, parameter in self._gradients(model):
            if self.mask_target == "update":
                kept[name] = parameter.detach().clone()
            assert parameter.grad is not None, "only parameters with a gradient are listed"
            parameter.grad = parameter.grad.contiguous()
            flat = parameter.grad.view(-1)
            for first in range(0, flat.numel(), CHUNK):
                part = flat[first : first + CHUNK]
                part.mul_(bernoulli(f"{self.seed}:{step}:{name}", first, part.numel(), self.p, part.device)).div_(self.p)

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        """Restore masked entries to the value they had, for f with `mask_target: update`."""
        super().after_step(model, step)
        kept = _kept(model, self.name)
        for name, parameter in model.named_parameters():
            if name in kept:
                mask = bernoulli(f"{self.seed}:{step}:{name}", 0, parameter.numel(), self.p, parameter.device)
                parameter.copy_(torch.where(mask.view_as(parameter), parameter, kept.pop(name)))

    def may_skip(self, name: str) -> bool:
        """Return whether the mask of f may keep every entry of a small tensor where it is."""
        return self.variant == "f" and self.mask_target == "update"

    def delta(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the trained tensors in full for f; for d indices and values, and the tensors outside the scope."""
        return Wrapper.delta(self, model)

    def describe(self, model: nn.Module) -> Iterator[tuple[str, int]]:
        """Yield what trains, with a word on what f is."""
        if self.variant == "f":
            count = sum(w.numel for name, w in base_weights(model).items() if name in self.opened(model))
            yield f"every tensor of '{self._scope()}' (regularised full fine-tuning)", count
            return
        yield from super().describe(model)
        rest = self.opened(model)
        yield "outside the scope, in full", sum(w.numel for name, w in base_weights(model).items() if name in rest)

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: f: dense; d: 20 bytes an entry, and the rest dense."""
        facts = super().memory(model)
        dense = sum(w.numel for name, w in base_weights(model).items() if name in self.opened(model))
        for key, size in (("trainable", 1), ("optimizer_bytes", 8), ("gradient_bytes", 4)):
            facts[key] += size * dense
        return facts


def _kept(model: nn.Module, owner: str) -> dict[str, Tensor]:
    """Return weights as they were before the running step; on the model, because a wrapper holds no tensors."""
    return model.__dict__.setdefault(f"_{owner}_before_step", {})
