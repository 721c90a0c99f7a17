"""Diff pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from llmrecipe.core.errors import ModelError
from llmrecipe.core.option_types import Annotated, Field, Literal, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods.selective._engines.base_weight import Selected
from llmrecipe.methods.selective._engines.hard_concrete import DiffGate
from llmrecipe.methods.selective._engines.l0_phase import GatePhase
from llmrecipe.methods.selective._engines.sparse_method import attach_chosen, base_weights, chosen_from
from llmrecipe.methods.selective._engines.top_k import top_k

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmrecipe.methods.selective._engines.base_weight import Selected
    from llmrecipe.methods.selective._engines.hard_concrete import DiffGate


@register
class DiffPruning(GatePhase, Wrapper):
    """Diff pruning: theta = theta_0 + delta, delta_i = z_i w_i; an L0 penalty closes the gates z, then the survivors train.

    Phase 1 (steps 0 to l0_steps): every entry has a difference w and a hard-concrete gate z in [0, 1],
    z = min(1, max(0, s (high - low) + low)), s = sigma(logit u + alpha), one draw of u a step. The loss gains
    l0 * E ||delta||_0, E ||delta||_0 = sum_i sigma(alpha_i - ln(-low / high)). `mode: structured` gives every tensor one more
    gate, delta_i = z_i z_g w_i, and multiplies the probabilities. Phase 2: u is drawn once and the `density` largest |delta|
    of all entries together are kept, exactly. Phase 3: these train on from their w with z = 1, on the sparse-delta engine.

    Trained: 2 N numbers (and one a tensor) in phase 1, which takes about 36 bytes a parameter, more than full fine-tuning;
    then floor(density N), 20 bytes each. New task heads train in full, outside penalty and budget. Starts at the base model
    (w = 0). Merging is possible after phase 2. The change of phase goes through the run's rebuild; resume works in each.

    Phase 1 also costs time that no number of tokens lowers: noise, gates, sum, penalty and the optimizer's pass over alpha,
    once a step for every weight. A step of 1,024 tokens takes about 1.7 times one of full fine-tuning, a step of 128 about 3.4
    times (one CPU core, float32, 1.7 M weights); with more tokens a step, in one or many micro-batches, it weighs less.

    With optim.lr 5e-5 the scales give the paper's rates: 1e-5 for w, 0.1 for alpha, 5e-5 in phase 3. `adaptive: false` is the
    paper's baseline: full fine-tuning in phase 1, magnitude pruning, phase 3.

    Paper: Parameter-Efficient Transfer Learning with Diff Pruning (arXiv 2012.07463). Departures: one schedule over both
    phases; the run's own gradient clipping over all tensors together; exactly k survivors where the authors' threshold may
    keep ties; evaluation in phase 1 takes the gates at u = 1/2.
    """

    unsharded: ClassVar[str] = "it changes what trains during the run, and the states of a divided optimizer do not follow"
    stage: ClassVar[Stage] = Stage.SELECT
    mergeable: ClassVar[bool] = True
    needs_gradients: ClassVar[str] = "learns gates by gradients"
    lifecycle_hooks: ClassVar[tuple[str, ...]] = ("before_step", "penalty")
    conflicts: ClassVar[dict[str, str]] = {
        "nf4": "its first phase replaces base weights by sums, which quantized weights cannot be",
        "int8": "its first phase replaces base weights by sums, which quantized weights cannot be",
    }

    mode: Literal["structured", "unstructured"] = "structured"
    """structured: one more gate for each tensor."""
    density: Annotated[float, Field(gt=0.0, le=1.0)] = 0.005
    """Share of the entries that survive."""
    l0_steps: PositiveInt = 1000
    """Optimizer steps of phase 1; the rest of the run is phase 3."""
    l0: NonNegativeFloat = 1.25e-7
    """Weight of the expected number of changed entries. It is a sum: compare l0 times their number with the task loss."""
    l0_per_parameter: bool = False
    """Divide the penalty by the number of entries, so that l0 does not depend on the model's size."""
    l0_warmup: NonNegativeInt = 0
    """Steps over which l0 grows from zero; the paper has none."""
    penalty_form: Literal["paper", "code"] = "paper"
    """structured: product of both probabilities, or their sum, as the authors' code has it."""
    low: Annotated[float, Field(lt=0.0)] = -1.5
    """Lower end of the stretched gate."""
    high: Annotated[float, Field(gt=1.0)] = 1.5
    """Upper end of the stretched gate."""
    alpha_init: float = 5.0
    """Initial value of the gates' logits: P(z > 0) = 0.993."""
    adaptive: bool = True
    """False: no gates, magnitude pruning of a full fine-tuning."""
    w_lr_scale: PositiveFloat = 0.2
    """Learning rate of w over optim.lr."""
    alpha_lr_scale: PositiveFloat = 2000.0
    """Learning rate of the gates over optim.lr."""
    scope: str = "all"
    """Tensors that may change: `all`, `blocks`, or a target."""
    seed: int = 0
    """Seed of u."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add gates at every tensor of the scope, or the survivors of a saved run that was past them.

        Raises:
            ModelError: a tensor of the scope is quantized.
        """
        if structure is not None and structure["phase"] == "fixed":
            attach_chosen(model, self.name, chosen_from(structure))
            return
        alpha = self.alpha_init if self.adaptive else None
        for weight in base_weights(model, self.scope).values():
            self.add_gates(weight, DiffGate(weight, self.low, self.high, alpha, self.mode == "structured"))
        self.aim(model, 0)

    def penalizes(self) -> bool:
        """Return whether there are gates: without them there is nothing to close."""
        return self.adaptive

    def expected(self, hooks: list[DiffGate]) -> Tensor | float:
        """Return E ||delta||_0, tensor by tensor."""
        total: Tensor | float = 0.0
        for hook in hooks:
            total = total + hook.expected(self.penalty_form == "paper")
        return total

    def survivors(self, model: nn.Module, hooks: list[DiffGate], draw: str) -> dict[str, Selected]:
        """Return the largest |delta| of all entries together."""
        k = int(self.density * sum(hook.w.numel() for hook in hooks))
        if k < 1:
            raise ModelError(f"stack.{self.name}.density: {self.density} leaves no entry to train")
        best = top_k([(hook.source, hook.difference(draw).abs_(), None) for hook in hooks], k)
        return {name: Selected(idx) for name, idx in best.items() if idx.numel()}
