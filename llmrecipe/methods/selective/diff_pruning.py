"""Diff pruning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from llmrecipe.errors import ModelError
from llmrecipe.fields import Annotated, Field, Literal, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from llmrecipe.methods.inject import all_ports, eject, inject
from llmrecipe.methods.sparse_wrapper import SparseHooks, attach_chosen, base_weights, chosen_from, sparse_ports
from llmrecipe.methods.wrapper import ParamGroup, Stage, Wrapper
from llmrecipe.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmrecipe.methods.hard_concrete import DiffGate


@register
class DiffPruning(SparseHooks, Wrapper):
    """Diff pruning: theta = theta_0 + delta, delta_i = z_i w_i; an L0 penalty closes the gates z, then the survivors train.

    Phase 1 (steps 0 to l0_steps): every entry has a difference w and a hard-concrete gate z in [0, 1],
    z = min(1, max(0, s (high - low) + low)), s = sigma(logit u + alpha), one draw of u a step. The loss gains
    l0 * E ||delta||_0, E ||delta||_0 = sum_i sigma(alpha_i - ln(-low / high)). `mode: structured` gives every tensor one more
    gate, delta_i = z_i z_g w_i, and multiplies the probabilities. Phase 2: u is drawn once and the `density` largest |delta|
    of all entries together are kept, exactly. Phase 3: these train on from their w with z = 1, on the sparse-delta engine.

    Trained: 2 N numbers (and one a tensor) in phase 1, which takes about 36 bytes a parameter, more than full fine-tuning;
    then floor(density N), 20 bytes each. New task heads train in full, outside penalty and budget. Starts at the base model
    (w = 0). Merging is possible after phase 2. The change of phase goes through the run's rebuild; resume works in each.

    With optim.lr 5e-5 the scales give the paper's rates: 1e-5 for w, 0.1 for alpha, 5e-5 in phase 3. `adaptive: false` is the
    paper's baseline: full fine-tuning in phase 1, magnitude pruning, phase 3.

    Paper: Parameter-Efficient Transfer Learning with Diff Pruning (arXiv 2012.07463). Departures: one schedule over both
    phases; the run's own gradient clipping over all tensors together; exactly k survivors where the authors' threshold may
    keep ties; evaluation in phase 1 takes the gates at u = 1/2.
    """

    stage: ClassVar[Stage] = Stage.SELECT
    mergeable: ClassVar[bool] = True
    hooks: ClassVar[tuple[str, ...]] = ("before_step", "penalty")
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
    """Start of the gates' logits: P(z > 0) = 0.993."""
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
        """Gates on every tensor of the scope, or the survivors of a saved run that was past them.

        Raises:
            ModelError: a tensor of the scope is quantized.
        """
        from llmrecipe.methods.hard_concrete import DiffGate, DiffTied

        if structure is not None and structure["phase"] == "fixed":
            attach_chosen(model, self.name, chosen_from(structure))
            return
        for weight in base_weights(model, self.scope).values():
            if weight.quantized:
                raise ModelError(f"stack.{self.name}: {weight.name} is quantized; {self.conflicts['nf4']}")
            first = None
            for module, tensor in weight.owners:
                child = self.name if tensor == "weight" else f"{self.name}__{tensor}"
                if first is None:
                    alpha = self.alpha_init if self.adaptive else None
                    first = DiffGate(weight, tensor, self.low, self.high, alpha, self.mode == "structured")
                    inject(module, child, first, self.name)
                else:
                    inject(module, child, DiffTied(first, tensor), self.name)
        self._aim(model, 0)

    def structure(self, model: nn.Module) -> dict[str, Any]:
        """The phase, and the survivors' shapes once there are any."""
        return {"phase": "l0"} if self._gates(model) else {"phase": "fixed", **super().structure(model)}

    def _gates(self, model: nn.Module) -> list[DiffGate]:
        from llmrecipe.methods.hard_concrete import DiffGate

        return [port for _, _, _, port in all_ports(model, self.name) if isinstance(port, DiffGate)]

    def _aim(self, model: nn.Module, step: int) -> None:
        for port in self._gates(model):
            port.draw = f"{self.seed}:{step}"

    def before_step(self, model: nn.Module, step: int) -> bool:
        """A fresh u for the step; at l0_steps the pruning, which changes what trains."""
        model.__dict__[f"_{self.name}_step"] = step
        self._aim(model, step)
        if step < self.l0_steps or not self._gates(model):
            return False
        self.prune(model)
        return True

    @torch.no_grad()
    def prune(self, model: nn.Module) -> None:
        """Keep the largest |delta| of one draw and go on from their w."""
        from llmrecipe.methods.selection import top_k
        from llmrecipe.methods.sparse_delta import Chosen

        gates = self._gates(model)
        k = int(self.density * sum(port.w.numel() for port in gates))
        if k < 1:
            raise ModelError(f"stack.{self.name}.density: {self.density} leaves no entry to train")
        best = top_k([(port.source, port.difference(f"{self.seed}:prune").abs_(), None) for port in gates], k)
        learned = {port.source: port.w.detach().reshape(-1)[best[port.source]] for port in gates}
        for _, module, name, _ in list(all_ports(model, self.name)):
            eject(module, name)
        attach_chosen(model, self.name, {name: Chosen(idx) for name, idx in best.items() if idx.numel()})
        for _, _, port in sparse_ports(model, self.name):
            port.values.copy_(learned[port.source])

    def penalty(self, model: nn.Module) -> Tensor | float:
        """l0 * E ||delta||_0 while there are gates."""
        gates = self._gates(model) if self.adaptive else []
        if not gates:
            return 0.0
        share = self.l0 / (sum(p.w.numel() for p in gates) if self.l0_per_parameter else 1)
        if self.l0_warmup:
            share *= min(1.0, (model.__dict__.get(f"_{self.name}_step", 0) + 1) / self.l0_warmup)
        total: Tensor | float = 0.0
        for port in gates:
            total = total + port.expected(self.penalty_form == "paper")
        return total * share

    def groups(self, model: nn.Module) -> list[ParamGroup]:
        """Phase 1: own rates of w and of the gates, no decay."""
        parts: dict[str, set[str]] = {"w": set(), "alpha": set()}
        for path, _, name, port in all_ports(model, self.name):
            prefix = f"{path}.{name}" if path else name
            for key, _ in port.named_parameters():
                if key in ("w", "alpha", "group"):
                    parts["w" if key == "w" else "alpha"].add(f"{prefix}.{key}")
        scales = {"w": self.w_lr_scale, "alpha": self.alpha_lr_scale}
        return [ParamGroup(frozenset(names), scales[key], 0.0) for key, names in parts.items() if names]

    def delta(self, model: nn.Module) -> dict[str, Tensor]:
        """Phase 1: w and gates, dense; then indices and values."""
        return Wrapper.delta(self, model)

    def describe(self, model: nn.Module) -> Iterator[tuple[str, int]]:
        """Phase 1 with the size of its penalty, or the survivors."""
        gates = self._gates(model)
        if not gates:
            yield from super().describe(model)
            return
        count = sum(port.w.numel() for port in gates)
        with torch.no_grad():
            penalty = float(self.penalty(model)) if gates[0].w.device.type != "meta" else float("nan")
        yield f"differences w (phase 1; penalty at the start {penalty:.3g} beside the task loss)", count
        yield "gates alpha", sum(p.numel() for port in gates for n, p in port.named_parameters() if n != "w")

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Phase 1: w and alpha with gradients and two moments each, 32 bytes an entry beside the base."""
        gates = self._gates(model)
        if not gates:
            return super().memory(model)
        count = sum(p.numel() for port in gates for p in port.parameters())
        return {"trainable": count, "optimizer_bytes": 8 * count, "gradient_bytes": 4 * count, "index_bytes": 0}
