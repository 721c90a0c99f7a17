"""DyLoRA."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.option_types import Literal, NonNegativeInt, OpenFraction, PositiveFloat, PositiveInt, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods._engines import low_rank
from llmrecipe.methods._engines.kept_entries import entries_kept
from llmrecipe.models.hooks.hook import all_hooks, device_of, row_index
from llmrecipe.models.hooks.host import add_hook, merge_hooks
from llmrecipe.models.module_map import anatomy

if TYPE_CHECKING:
    from torch import nn


class NestedLowRank(low_rank.LowRank):
    """y + (alpha / b) B[:, :b] A[:b] x for the rank b in use.

    The cut is a vector of length r multiplied into A x, so shapes never change with b.
    """

    gain: Tensor
    learns: Tensor

    def __init__(self, width_in: int, width_out: int, r: int, alpha: float, dropout: float, rows: Tensor | None):
        super().__init__(width_in, width_out, r, alpha / r, dropout, rows)
        self.alpha = alpha
        self.drawn = r
        self.register_buffer("gain", torch.empty(r), persistent=False)
        self.register_buffer("learns", torch.empty(r, dtype=torch.bool), persistent=False)
        self.use(r)

    def use(self, b: int, learning: range | None = None) -> None:
        """Compute with the first b ranks; gradients go to the listed ones only (None: to all b)."""
        self.b = b
        ranks = torch.arange(len(self.gain), device=self.gain.device)
        self.gain.copy_((ranks < b) * (self.alpha / b))
        self.learns.copy_(
            torch.ones_like(self.learns) if learning is None else (ranks >= learning.start) & (ranks < learning.stop)
        )
        self.partly = learning is not None

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + B diag(gain) A dropout(x), (..., out)."""
        A: Tensor = self.A
        B: Tensor = self.B
        if self.partly and torch.is_grad_enabled():
            A = torch.where(self.learns[:, None], A, A.detach())
            B = torch.where(self.learns, B, B.detach())
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        h = F.linear(dropped, A.to(x.dtype)) * self.gain.to(x.dtype)
        change = F.linear(h, B.to(h.dtype)).to(y.dtype)
        return y + change if self.rows is None else y.index_add(-1, self.rows, change)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return the first b ranks: (A[:b], B[:, :b], alpha / b)."""
        return self.A.detach()[: self.b], self.B.detach()[:, : self.b], self.alpha / self.b

    def product(self) -> Tensor:
        """Return (alpha / b) B[:, :b] A[:b] in float32, (out, in)."""
        A, B, scale = self.factors()
        return (B.float() @ A.float()) * scale


@register
class Dylora(Wrapper):
    """DyLoRA: y = W x + (alpha / b) B[:, :b] A[:b] x; one run gives LoRA weights for every rank b from r_min to r.

    Each optimizer step draws one b for all modules from (seed, step), so every process, micro-batch, activation checkpoint and
    resumed run sees the same. With `update: frozen` only rank b learns in that step, with `full` the first b do. A (r, in)
    starts Kaiming-uniform, B (out, r) at zero: step 0 is the base at every b. Evaluation, generation and merging use `rank`
    (`eval RUN stack.dylora.rank=2`, `export RUN --rank 2`); merging is exact up to rounding at that rank.

    Paper: DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low Rank Adaptation (arXiv
    2210.07558). As in its code, ranks whose gradient is zero still move by the optimizer's momentum and decay; `freeze: strict`
    keeps them, their moments included, as they were.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1",)
    unsharded: ClassVar[str] = "the ranks it trains in a step are entries of tensors of which each process holds a part"
    stage: ClassVar[Stage] = Stage.INJECT
    mergeable: ClassVar[bool] = True
    lifecycle_hooks: ClassVar[tuple[str, ...]] = ("before_step", "after_step")
    adjustable: ClassVar[tuple[str, ...]] = ("rank",)

    target: str = "attn.q|v"
    """Linear sites that get a branch."""
    r: Rank = 8
    """Largest rank."""
    r_min: PositiveInt = 1
    """Smallest rank."""
    alpha: PositiveFloat = 16.0
    """The branch is scaled by alpha / b at every rank b."""
    dropout: OpenFraction = 0.0
    """Dropout on the branch's input while training."""
    update: Literal["frozen", "full"] = "frozen"
    """Which ranks learn in a step: the drawn one, or all up to it."""
    freeze: Literal["grad", "strict"] = "grad"
    """grad: other ranks have zero gradients (the paper's code); strict: they and their optimizer state do not move at all."""
    distribution: Literal["uniform", "geometric"] = "uniform"
    """How b is drawn."""
    geometric_p: OpenFraction = 0.15
    """Parameter of the geometric distribution: larger prefers smaller ranks."""
    granularity: PositiveInt = 1
    """Ranks are drawn, and learn, in blocks of this many; r is a multiple of it. Ranks up to the first multiple that is not
    below r_min are one block."""
    rank: Rank | None = None
    """Rank outside of training steps; None is r."""
    seed: NonNegativeInt = 0
    """Seed of the draws."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add a nested pair at every site of `target`.

        Raises:
            RecipeError: the ranks do not fit each other.
            ModelError: a site is not a linear layer.
        """
        if self.r_min > self.r or (self.rank or 1) > self.r:
            name, value = ("r_min", self.r_min) if self.r_min > self.r else ("rank", self.rank)
            raise RecipeError(f"stack.{self.name}.{name}: {value} is larger than r={self.r}, the largest rank that is trained")
        if structure is None and self.r % self.granularity:
            raise RecipeError(
                f"stack.{self.name}.granularity: r={self.r} is no multiple of {self.granularity}, so the blocks of ranks would "
                f"differ in size; take a divisor of r"
            )
        for site in anatomy(model).at(self.target):
            if not low_rank.is_linear_site(site):
                raise ModelError(
                    f"stack.{self.name}: {site.path} is not a linear layer; dylora nests the ranks of linear layers"
                )
            with torch.device(device_of(site.module)):
                rows = row_index(site)
                hook = NestedLowRank(site.width_in, site.width_out, self.r, self.alpha, self.dropout, rows)
                low_rank.init_low_rank(hook)
                hook.use(self.rank or self.r)
            add_hook(site.module, site.name(self.name), hook, self.name)

    def choices(self) -> list[int]:
        """Return the ranks b can take: the multiples of `granularity` from `r_min` to r."""
        first = -(-self.r_min // self.granularity) * self.granularity
        return list(range(first, self.r + 1, self.granularity))

    def draw(self, step: int) -> int:
        """Draw the rank of a step, a function of seed and step alone."""
        choices = self.choices()
        source = random.Random(f"dylora {self.seed} {step}")
        if self.distribution == "uniform":
            return source.choice(choices)
        weights = [(1.0 - self.geometric_p) ** i for i in range(len(choices))]
        return source.choices(choices, weights)[0]

    def learning(self, b: int) -> range | None:
        """Return the ranks that learn when b is drawn; None for all up to b."""
        if self.update == "full":
            return None
        below = [c for c in self.choices() if c < b]
        return range(below[-1] if below else 0, b)

    def before_step(self, model: nn.Module, step: int) -> bool | None:
        """Draw b and give it to every module."""
        b = self.draw(step)
        for hook in self._hooks(model):
            hook.use(b, self.learning(b))
            hook.drawn = b
        return None

    def after_step(self, model: nn.Module, step: int) -> None:
        """Return to the rank of evaluation."""
        for hook in self._hooks(model):
            hook.use(self.rank or self.r)

    def stepping(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> contextlib.AbstractContextManager[None]:
        """Keep the ranks that do not learn as they were, with their moments, under `freeze: strict`."""
        return entries_kept(optimizer, self._still(model) if self.freeze == "strict" else ())

    def _still(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield A and B with what of them stays."""
        for hook in self._hooks(model):
            active = hook.learns & (hook.gain > 0)
            yield hook.A, ~active[:, None]
            yield hook.B, ~active

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Return the rank drawn for the last step."""
        return {"rank": float(self._hooks(model)[0].drawn)}

    def merge(self, model: nn.Module) -> None:
        """Set W <- W + (alpha / b) B[:, :b] A[:b] at the rank in use."""
        merge_hooks(model, self.name)

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms as of LoRA at r: all ranks are held, one (or b) of them learns in a step."""
        count = sum(n for _, n in self.describe(model))
        return {"trainable": count, "optimizer_bytes": 8 * count, "gradient_bytes": 4 * count}

    def _hooks(self, model: nn.Module) -> list[NestedLowRank]:
        return [hook for _, _, _, hook in all_hooks(model, self.name) if isinstance(hook, NestedLowRank)]
