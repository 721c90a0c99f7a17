"""What the wrappers share that first train gated differences under an L0 penalty, then keep a selection and train it on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.methods._base.method import ParamGroup
from llmrecipe.methods.selective._engines.base_weight import Selected, Weight
from llmrecipe.methods.selective._engines.hard_concrete import Gated, GateTied
from llmrecipe.methods.selective._engines.sparse_kernels import gather_selected
from llmrecipe.methods.selective._engines.sparse_method import SparseMethod, attach_chosen, sparse_hooks
from llmrecipe.models.hooks.hook import all_hooks
from llmrecipe.models.hooks.host import add_hook, remove_hook


class GatePhase(SparseMethod):
    """Phase 1: gates under the penalty l0 E ||delta||_0. At step l0_steps: the selection. Then: the sparse-delta engine.

    Mixed into `Wrapper`s, which declare the options below and say how delta is counted and what survives. Without gates (no
    phase 1, or past it) everything is as in `SparseMethod`.
    """

    seed: int
    l0_steps: int
    l0: float
    l0_per_parameter: bool
    l0_warmup: int
    w_lr_scale: float
    alpha_lr_scale: float

    def expected(self, hooks: list[Any]) -> Tensor | float:
        """Return E ||delta||_0 of all hooks together."""
        raise NotImplementedError

    def survivors(self, model: nn.Module, hooks: list[Any], draw: str) -> dict[str, Selected]:
        """Return what of every tensor trains on; `draw` is the counter of the one u the differences are computed at."""
        raise NotImplementedError

    def gates(self, model: nn.Module) -> list[Any]:
        """Return the gated differences; none after phase 1."""
        return [hook for _, _, _, hook in all_hooks(model, self.name) if isinstance(hook, Gated)]

    def add_gates(self, weight: Weight, hook: Gated) -> None:
        """Add the gated difference of a tensor at its users.

        Raises:
            ModelError: the tensor is quantized.
        """
        if weight.quantized:
            raise ModelError(
                f"stack.{self.name}: {weight.name} is quantized; the first phase replaces base weights by sums, which "
                "quantized weights cannot be"
            )
        for index, (module, tensor) in enumerate(weight.owners):
            child = self.name if tensor == "weight" else f"{self.name}__{tensor}"
            add_hook(module, child, hook if index == 0 else GateTied(hook, tensor), self.name)

    def structure(self, model: nn.Module) -> dict[str, Any]:
        """Return the phase, and the survivors' shapes once there are any."""
        return {"phase": "l0"} if self.gates(model) else {"phase": "fixed", **super().structure(model)}

    def aim(self, model: nn.Module, step: int) -> None:
        """Set the u of a step in the gates."""
        for hook in self.gates(model):
            hook.draw = f"{self.seed}:{step}"

    def before_step(self, model: nn.Module, step: int) -> bool:
        """Draw a fresh u for the step; at l0_steps make the selection, which changes what trains."""
        model.__dict__[f"_{self.name}_step"] = step
        self.aim(model, step)
        if step < self.l0_steps or not self.gates(model):
            return False
        self.prune(model)
        return True

    def after_step(self, model: nn.Module, step: int) -> None:
        """Free what was formed for the step."""
        for hook in self.gates(model):
            hook.forget()
        super().after_step(model, step)

    @torch.no_grad()
    def prune(self, model: nn.Module) -> None:
        """Keep the survivors of one draw and go on from their w, with z = 1."""
        hooks = self.gates(model)
        chosen = self.survivors(model, hooks, f"{self.seed}:prune")
        learned = {
            hook.source: gather_selected(hook.w.detach(), chosen[hook.source].layout, chosen[hook.source].idx.to(hook.w.device))
            for hook in hooks
            if hook.source in chosen
        }
        for _, module, name, _ in list(all_hooks(model, self.name)):
            remove_hook(module, name)
        attach_chosen(model, self.name, chosen)
        for _, _, hook in sparse_hooks(model, self.name):
            hook.values.copy_(learned[hook.source])

    def penalty(self, model: nn.Module) -> Tensor | float:
        """Return l0 * E ||delta||_0 while there are gates."""
        hooks = self.gates(model) if self.penalizes() else []
        if not hooks:
            return 0.0
        share = self.l0 / (sum(p.w.numel() for p in hooks) if self.l0_per_parameter else 1)
        if self.l0_warmup:
            share *= min(1.0, (model.__dict__.get(f"_{self.name}_step", 0) + 1) / self.l0_warmup)
        return self.expected(hooks) * share

    def penalizes(self) -> bool:
        """Return whether phase 1 has gates to close."""
        raise NotImplementedError

    def groups(self, model: nn.Module) -> list[ParamGroup]:
        """Return phase 1's own rates of w and of the gates, without decay."""
        parts: dict[str, set[str]] = {"w": set(), "alpha": set()}
        for path, _, name, hook in all_hooks(model, self.name):
            if isinstance(hook, Gated):
                prefix = f"{path}.{name}" if path else name
                for key, _ in hook.named_parameters():
                    parts["w" if key == "w" else "alpha"].add(f"{prefix}.{key}")
        scales = {"w": self.w_lr_scale, "alpha": self.alpha_lr_scale}
        return [ParamGroup(frozenset(names), scales[key], 0.0) for key, names in parts.items() if names]

    def describe(self, model: nn.Module) -> Iterator[tuple[str, int]]:
        """Yield phase 1 with the size of its penalty, or the survivors."""
        hooks = self.gates(model)
        if not hooks:
            yield from super().describe(model)
            return
        count = sum(hook.w.numel() for hook in hooks)
        with torch.no_grad():
            penalty = float(self.penalty(model)) if hooks[0].w.device.type != "meta" else float("nan")
        yield f"differences w (phase 1; penalty at the start {penalty:.3g} next to the task loss)", count
        yield "gates alpha", sum(p.numel() for hook in hooks for n, p in hook.named_parameters() if n != "w")

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: w and alpha of phase 1 with gradients and two moments, 16 bytes a number besides the base."""
        hooks = self.gates(model)
        if not hooks:
            return super().memory(model)
        count = sum(p.numel() for hook in hooks for p in hook.parameters())
        return {"trainable": count, "optimizer_bytes": 8 * count, "gradient_bytes": 4 * count, "index_bytes": 0}
