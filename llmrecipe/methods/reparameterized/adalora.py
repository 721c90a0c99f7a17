"""AdaLoRA."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError, RecipeError
from llmrecipe.core.option_types import Literal, NonNegativeFloat, OpenFraction, PositiveFloat, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.data.transfer import exact_float
from llmrecipe.methods._base.method import Probe, Stage, Wrapper
from llmrecipe.methods._engines import low_rank
from llmrecipe.methods._engines.biases import open_biases
from llmrecipe.models.hooks.hook import all_hooks, device_of, row_index
from llmrecipe.models.hooks.host import add_hook, merge_hooks
from llmrecipe.models.hooks.shared_module import SharedModule, add_shared, shared_modules
from llmrecipe.models.module_map import anatomy

FACTORS = ("A", "E", "B")
"""Q (r, in), the singular values (r, 1), P (out, r)."""


def budget(t: int, first: int, last: int, total: int, start: int, end: int) -> int:
    """Return the triplets kept after t steps: `start` up to step `first`, a cubic fall to `end`, `last` steps before `total`.

    Examples:
        >>> [budget(t, first=10, last=10, total=60, start=96, end=64) for t in (0, 10, 30, 50)]
        [96, 96, 68, 64]
    """
    if t <= first:
        return start
    if t >= total - last:
        return end
    left = 1.0 - (t - first) / (total - last - first)
    return int(end + (start - end) * left**3)


def keep_best(scores: Tensor, count: int) -> Tensor:
    """Return the mask of the `count` largest scores; of equal ones the first are kept, so that every process agrees."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[torch.sort(scores, descending=True, stable=True).indices[:count]] = True
    return kept


class SvdLowRank(low_rank.LowRank):
    """y + s B (E * A dropout(x)), with the smoothed importance of every entry while it is needed."""

    kept: Tensor
    mean_A: Tensor
    mean_E: Tensor
    mean_B: Tensor
    spread_A: Tensor
    spread_E: Tensor
    spread_B: Tensor

    def __init__(self, width_in: int, width_out: int, r: int, scale: float, dropout: float, rows: Tensor | None, scored: bool):
        super().__init__(width_in, width_out, r, scale, dropout, rows)
        self.E = nn.Parameter(torch.zeros(r, 1))
        self.register_buffer("kept", torch.ones(r, dtype=torch.bool))
        self.cut: Tensor | None = None
        """Triplets that were left by the pruning of the step that is about to run."""
        for name in FACTORS:
            like = getattr(self, name)
            self.register_buffer(f"mean_{name}", torch.zeros_like(like, requires_grad=False) if scored else None)
            self.register_buffer(f"spread_{name}", torch.zeros_like(like, requires_grad=False) if scored else None)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s B (E * A dropout(x)), (..., out)."""
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return low_rank.branch(dropped, self.A * self.E, self.B, self.scale, y, self.rows)

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Update I = |w dL/dw|; mean <- beta1 mean + (1 - beta1) I; spread <- beta2 spread + (1 - beta2) |I - mean|."""
        for name in FACTORS:
            parameter, mean, spread = getattr(self, name), getattr(self, f"mean_{name}"), getattr(self, f"spread_{name}")
            if parameter.grad is None or mean is None:
                continue
            now = (parameter * parameter.grad).abs()
            mean.mul_(beta1).add_(now, alpha=1 - beta1)
            spread.mul_(beta2).add_((now - mean).abs_(), alpha=1 - beta2)

    def scores(self) -> Tensor:
        """Return the importance (r,) of each triplet: s(E_k) + mean_j s(B_jk) + mean_j s(A_kj), s = mean * spread."""
        return (
            (self.mean_E * self.spread_E)[:, 0] + (self.mean_B * self.spread_B).mean(0) + (self.mean_A * self.spread_A).mean(1)
        )

    @torch.no_grad()
    def mask(self) -> None:
        """Set the singular values of dropped triplets to zero; their vectors stay, so that they may come back."""
        self.E.masked_fill_(~self.kept[:, None], 0.0)

    @torch.no_grad()
    def drop(self) -> None:
        """Remove the masked triplets from A, E and B; the parameters stay the same objects, so the optimizer knows them."""
        self.cut = self.kept.nonzero()[:, 0]
        self.A.data, self.E.data, self.B.data = (
            self.A.data[self.cut],
            self.E.data[self.cut],
            self.B.data[:, self.cut].contiguous(),
        )
        self.A.grad = self.E.grad = self.B.grad = None
        self.kept = torch.ones(len(self.cut), dtype=torch.bool, device=self.A.device)

    def forget(self) -> None:
        """Drop the importances: the pattern is final."""
        for name in FACTORS:
            setattr(self, f"mean_{name}", None)
            setattr(self, f"spread_{name}", None)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return (E A, B, s) of the kept triplets; one that is zero where none is."""
        if not bool(self.kept.any()):
            return self.A.new_zeros(1, self.A.shape[1]), self.B.new_zeros(self.B.shape[0], 1), self.scale
        return (self.A * self.E).detach()[self.kept], self.B.detach()[:, self.kept], self.scale

    def product(self) -> Tensor:
        """Return s B diag(E) A in float32, (out, in)."""
        return (self.B.float() @ (self.A * self.E).float()) * self.scale


class Budget(SharedModule):
    """What the allocator knows about the run: its length, and what it last did."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.long))
        self.orth: Tensor | float = 0.0
        self.read: tuple[tuple[int, int], int] | None = None

    def length(self) -> int:
        """Return `total`, which is read from the device once after it is written."""
        written = (id(self.total), self.total._version)
        if self.read is None or self.read[0] != written:
            self.read = (written, int(self.total))
        return self.read[1]


@register
class Adalora(Wrapper):
    """AdaLoRA: y = W x + alpha / (R + 1e-5) P diag(l) Q x; a budget of ranks moves to the modules where it matters.

    P (out, r) and Q (r, in) start as N(0, 0.02^2), the singular values l at zero: step 0 is the base. R is `init_r`, constant.
    After every step each entry's sensitivity |w dL/dw| is smoothed (beta1), so is its uncertainty (beta2); a triplet's score is
    s(l_k) + mean s(P_k) + mean s(Q_k) with s their product. Every `deltaT` steps the top b(t) triplets of all modules are kept
    and the other l set to zero; b falls from n init_r to n target_r by a cubic between `tinit` and `tfinal` steps before the
    end, then the pattern is frozen and enforced after every step. A penalty keeps P and Q near orthogonal. Merging is exact up
    to rounding. `prune: at_final` takes the dropped triplets out of the tensors (and of the optimizer's state) when the pattern
    is frozen: the same function and the same gradients of the loss at less memory; the penalty then reads the kept ones alone.
    Masked triplets still have gradients, and pruned ones have none: where `optim.clip` acts, the norm it divides by is smaller
    from then on, so a pruned run takes other steps than one that only masks. Clipping also scales that step's sensitivities.

    Paper: AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (arXiv 2303.10512). Departures, as in its
    code: the budget is continuous at tinit, scores use the weights after the step, and `orth: fro_mean` averages un-squared
    norms. Ties are kept in order instead of all being dropped.
    """

    unsharded: ClassVar[str] = "it changes what trains during the run, and the states of a divided optimizer do not follow"
    stage: ClassVar[Stage] = Stage.INJECT
    mergeable: ClassVar[bool] = True
    lifecycle_hooks: ClassVar[tuple[str, ...]] = ("penalty", "after_step")
    needs_gradients: ClassVar[str] = "moves ranks by the size of gradients"

    target: str = "all-linear"
    """Linear sites that share the budget."""
    init_r: PositiveInt = 12
    """Rank of every site at the start."""
    target_r: PositiveInt = 8
    """Mean rank at the end."""
    alpha: PositiveFloat = 8.0
    """The branch is scaled by alpha / (init_r + 1e-5)."""
    dropout: OpenFraction = 0.0
    """Dropout on the branch's input while training."""
    tinit: NonNegativeFloat = 0.0
    """Steps before the budget starts to fall; below 1 a share of the run."""
    tfinal: NonNegativeFloat = 0.0
    """Steps at the end with a fixed pattern; below 1 a share of the run."""
    deltaT: PositiveInt = 1
    """Steps between two allocations."""
    beta1: OpenFraction = 0.85
    """Smoothing of the sensitivity."""
    beta2: OpenFraction = 0.85
    """Smoothing of its uncertainty."""
    orth_reg_weight: NonNegativeFloat = 0.5
    """Weight of the orthogonality penalty."""
    orth: Literal["fro_mean", "fro_sq_sum"] = "fro_mean"
    """Mean of ||P^T P - I|| over all P and Q (the code), or the sum of squares (the paper)."""
    prune: Literal["off", "at_final"] = "off"
    """at_final: drop masked triplets from the tensors `tfinal` steps before the end, rather than keep them at zero."""
    total_step: PositiveInt | None = None
    """Steps of the whole schedule; default: those of the run."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the base that train too: none, all of them, or those of the layers in the budget, whatever rank they keep."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add a triplet form at every site of `target`.

        Raises:
            RecipeError: the final rank is above the first one.
            ModelError: a site is not a linear layer.
        """
        if self.target_r > self.init_r:
            raise RecipeError(
                f"stack.{self.name}.target_r: {self.target_r} is larger than init_r={self.init_r}; ranks only fall"
            )
        sites = anatomy(model).at(self.target)
        for site in sites:
            if not low_rank.is_linear_site(site):
                raise ModelError(f"stack.{self.name}: {site.path} is not a linear layer; adalora ranks linear layers")
            with torch.device(device_of(site.module)):
                scored = bool((structure or {}).get("scored", True))
                scale = self.alpha / (self.init_r + 1e-5)
                rows = row_index(site)
                part = f"{site.path}{site.name('')}"
                r = int((structure or {}).get("pruned", {}).get(part, self.init_r))
                hook = SvdLowRank(site.width_in, site.width_out, r, scale, self.dropout, rows, scored)
                nn.init.normal_(hook.A, std=0.02)
                nn.init.normal_(hook.B, std=0.02)
            add_hook(site.module, site.name(self.name), hook, self.name)
        open_biases(model, self.name, self.bias, self.target, sites)
        shared = Budget().to(device_of(model))
        shared.total.fill_(self.total_step or 0)
        add_shared(model, shared, self.name)

    def structure(self, model: nn.Module) -> dict[str, Any]:
        """Return whether importances are still kept, every rank, and the number of triplets in tensors once pruned."""
        hooks = self._hooks(model)
        ranks = {path: int(hook.kept.sum()) for path, hook in hooks.items()}
        facts: dict[str, Any] = {"scored": any(hook.mean_E is not None for hook in hooks.values()), "ranks": ranks}
        if self._pruned(model):
            facts["pruned"] = {
                f"{path}{name.removeprefix(self.name)}": hook.A.shape[0] for path, _, name, hook in self._found(model)
            }
        return facts

    def _pruned(self, model: nn.Module) -> bool:
        return any(hook.A.shape[0] < self.init_r for hook in self._hooks(model).values())

    def calibrates(self) -> bool:
        """Return False: the length of the run is no choice of what trains."""
        return False

    def calibrate(self, model: nn.Module, probe: Probe) -> None:
        """Take the length of the schedule from the run.

        Raises:
            RecipeError: the phases leave no step for the budget to fall.
        """
        if self.total_step is None:
            self._shared(model).total.fill_(probe.steps)
        total, first, last = self.phases(model)
        if first >= total - last:
            raise RecipeError(
                f"stack.{self.name}: tinit={first} and tfinal={last} leave no step of {total} for the budget to fall; "
                "shorten them, or give them as shares of the run such as 0.1"
            )
        if self.shortens() and last == 0:
            raise RecipeError(
                f"stack.{self.name}.prune: at_final drops triplets when the last tfinal steps begin, and tfinal is 0; "
                "give it steps, or a share of the run such as 0.1"
            )

    def shortens(self) -> bool:
        """Return whether trained tensors lose rows during the run."""
        return self.prune == "at_final"

    def before_step(self, model: nn.Module, step: int) -> bool | None:
        """Drop what the final pattern leaves out with `prune: at_final`, after which other tensors train."""
        hooks = self._hooks(model).values()
        for hook in hooks:
            hook.cut = None
        total, _, last = self.phases(model)
        if not self.shortens() or step < total - last or all(bool(hook.kept.all()) for hook in hooks):
            return None
        for hook in hooks:
            hook.drop()
        return True

    def cuts(self, model: nn.Module) -> dict[str, tuple[int, Tensor]]:
        """Return the triplets left in A, E and B by the pruning."""
        found: dict[str, tuple[int, Tensor]] = {}
        for path, hook in self._hooks(model).items():
            if hook.cut is not None:
                found |= {f"{path}.A": (0, hook.cut), f"{path}.E": (0, hook.cut), f"{path}.B": (1, hook.cut)}
        return found

    def penalty(self, model: nn.Module) -> Tensor | float:
        """Return weight * mean (or sum) of ||P^T P - I|| and ||Q Q^T - I||, from r x r products of one shape at a time."""
        matrices: dict[torch.Size, list[Tensor]] = {}
        for hook in self._hooks(model).values():
            for matrix in (hook.A, hook.B.t()):
                if len(matrix):
                    matrices.setdefault(matrix.shape, []).append(low_rank.wide(matrix))
        apart = torch.cat([self._apart(torch.stack(group)) for group in matrices.values()])
        value = apart.mean() if self.orth == "fro_mean" else apart.square().sum()
        self._shared(model).orth = value.detach()
        return self.orth_reg_weight * value

    @staticmethod
    def _apart(wide: Tensor) -> Tensor:
        """Return (n,) ||M M^T - I|| of n matrices M (r, in)."""
        grams = wide @ wide.mT
        return torch.linalg.matrix_norm(grams - torch.eye(grams.shape[-1], device=grams.device, dtype=grams.dtype))

    def after_step(self, model: nn.Module, step: int) -> None:
        """Score, allocate when due, enforce the pattern at the end."""
        t, hooks = step + 1, list(self._hooks(model).values())
        total, first, last = self.phases(model)
        end = total - last
        if t < end:
            for hook in hooks:
                hook.observe(self.beta1, self.beta2)
        if t == end or (first < t < end and t % self.deltaT == 0):
            n = len(hooks)
            count = budget(t, first, last, total, n * self.init_r, n * self.target_r)
            kept = keep_best(torch.cat([hook.scores() for hook in hooks]), count)
            for hook, mask in zip(hooks, kept.split(self.init_r), strict=True):
                hook.kept.copy_(mask)
                hook.mask()
        elif t > end:
            for hook in hooks:
                hook.mask()
        if t == end:
            for hook in hooks:
                hook.forget()

    def metrics(self, model: nn.Module) -> dict[str, Tensor | float]:
        """Return the current ranks, and how far P and Q are from orthogonal."""
        ranks = torch.stack([hook.kept.sum() for hook in self._hooks(model).values()])
        return {
            "rank_mean": ranks.to(exact_float(ranks.device)).mean(),
            "rank_min": ranks.min(),
            "rank_max": ranks.max(),
            "orth": self._shared(model).orth,
        }

    def merge(self, model: nn.Module) -> None:
        """Set W <- W + s P diag(l) Q, b <- the trained b."""
        merge_hooks(model, self.name)

    def may_skip(self, name: str) -> bool:
        """Return whether it is the E of a module: it stays zero where the budget leaves the module no triplet."""
        return name.endswith(".E")

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: r (in + out + 1) a site and biases train; importances are two numbers an entry."""
        scored = sum(p.numel() for hook in self._hooks(model).values() for p in hook.parameters())
        count = sum(n for _, n in self.describe(model))
        return {"trainable": count, "optimizer_bytes": 8 * count, "gradient_bytes": 4 * count, "state_bytes": 8 * scored}

    def _found(self, model: nn.Module) -> list[tuple[str, nn.Module, str, SvdLowRank]]:
        """Return (module path, module, hook name, hook) of every triplet form."""
        return [(path, m, name, hook) for path, m, name, hook in all_hooks(model, self.name) if isinstance(hook, SvdLowRank)]

    def _hooks(self, model: nn.Module) -> dict[str, SvdLowRank]:
        return {f"{path}.{name}": hook for path, _, name, hook in self._found(model)}

    def _shared(self, model: nn.Module) -> Budget:
        return next(m for _, m in shared_modules(model, self.name) if isinstance(m, Budget))

    def phases(self, model: nn.Module) -> tuple[int, int, int]:
        """Return (steps of the schedule, steps before the fall, steps after it).

        Raises:
            RecipeError: the length of the run is unknown.
        """
        total = self._shared(model).length()
        if total == 0:
            raise RecipeError(f"stack.{self.name}.total_step: the length of the run is not known here; set it")
        first, last = (int(v if v >= 1 or v == 0 else v * total) for v in (self.tinit, self.tfinal))
        return total, first, last
