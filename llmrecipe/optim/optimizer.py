"""Optimizers: the interface, which parameters decay, and the groups an optimizer is built from.

Weight decay follows one rule, shown by `explain` and `check` as a table:

    matrix       weights with two or more dimensions           the optimizer's weight_decay
    embedding    token and position tables, the output head    the optimizer's weight_decay
    vector       norms, biases and other one-dimensional ones  0
    adapter      every tensor a method injected                0, because decaying it pulls the model to its base, not to zero
    (declared)   what a method declares in its `groups()`      as declared

`decay_adapters` of an optimizer puts the matrices of adapters back under its weight_decay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, overload

from pydantic.dataclasses import dataclass as pydantic_dataclass

from llmrecipe.core.device_profile import profile_of
from llmrecipe.core.errors import LlmRecipeError, RecipeError
from llmrecipe.core.registry import CONFIG

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from llmrecipe.methods._base.method import ParamGroup

Build = Callable[[list[dict[str, Any]]], "torch.optim.Optimizer"]
"""Builds an optimizer of some groups."""
Divide = Callable[[Build, list[dict[str, Any]]], "torch.optim.Optimizer"]
"""Builds an optimizer of which each process steps its own part."""
KINDS = ("matrix", "embedding", "vector", "adapter")


@pydantic_dataclass(config=CONFIG, kw_only=True)
class Optimizer:
    """An update rule for gradients. A component adds `lr`, `weight_decay`, `decay_adapters` and `clip` as its own options."""

    group: ClassVar[str] = "optim"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "mps", "xpu")
    """Device types the optimizer supports."""
    entrywise: ClassVar[bool] = False
    """Whether the state has one number per entry of a parameter, so that rows can be dropped from both alike."""
    shards: ClassVar[tuple[str, ...]] = ()
    """Values of `runtime.shard` under which it makes the steps of one process."""
    unscaled: ClassVar[bool] = True
    """Whether its steps have the same size for gradients of any scale, entry by entry, and its decay is apart from them: what
    the learning rates of a model with muP are made for."""
    unsharded: ClassVar[str] = ""
    """Why it is refused under others, as the end of a message."""

    def build(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the torch optimizer for parameter groups.

        Args:
            params: dicts with `params`, `lr`, `weight_decay`, and `names`, `kind`, `initial_lr`, which are only passed through.
        """
        raise NotImplementedError

    def state_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of optimizer state of one float32 parameter of this shape after its first step."""
        raise NotImplementedError


@dataclass(frozen=True)
class Group:
    """Trained parameters that share a learning rate and a weight decay."""

    kind: str
    """matrix, embedding, vector or adapter."""
    lr: float
    weight_decay: float
    lr_scale: float
    names: tuple[str, ...]
    parameters: tuple[Any, ...]

    @property
    def count(self) -> int:
        """Return the number of trained entries."""
        return sum(p.numel() for p in self.parameters)

    def row(self) -> dict[str, Any]:
        """Return one row of the table shown by `explain` and `check`."""
        return {
            "group": self.kind,
            "tensors": len(self.names),
            "parameters": self.count,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "example": self.names[0],
        }


def parameter_groups(model: nn.Module, optimizer: Optimizer, stack_groups: Iterable[ParamGroup] = ()) -> list[Group]:
    """Return the groups of all trainable parameters, in the order of the model; works on the meta device too.

    Args:
        stack_groups: the groups the wrappers declare (`Stack.groups`); they take precedence over the rule above.

    Raises:
        RecipeError: nothing trains, or the model scales learning rates that this optimizer would not scale so.
        LlmRecipeError: a wrapper names a parameter the model does not have, or two wrappers claim the same one.
    """
    declared = _declared_groups(model, stack_groups)
    kinds = _kinds(model)
    scales = _model_scales(model, optimizer)
    lr, decay = float(optimizer.lr), float(optimizer.weight_decay)  # type: ignore[attr-defined]
    decay_adapters = bool(getattr(optimizer, "decay_adapters", False))
    found: dict[tuple[str, float, float], list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = kinds.get(name) or ("matrix" if parameter.ndim > 1 else "vector")
        own = declared.get(name)
        decays = kind in ("matrix", "embedding") or (kind == "adapter" and decay_adapters and parameter.ndim > 1)
        wanted = own.weight_decay if own is not None and own.weight_decay is not None else (decay if decays else 0.0)
        scale = scales.get(name, 1.0) if kind == "matrix" else 1.0
        # Of a product of rate and decay the scale leaves what it was.
        wanted = wanted if own is not None and own.weight_decay is not None else wanted / scale
        found.setdefault((kind, scale * (own.lr_scale if own else 1.0), wanted), []).append((name, parameter))
    if not found:
        raise RecipeError("stack: nothing is left to train; every parameter is frozen")
    return [
        Group(kind, lr * scale, wanted, scale, tuple(n for n, _ in members), tuple(p for _, p in members))
        for (kind, scale, wanted), members in found.items()
    ]


def _model_scales(model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
    """Return what a model multiplies the learning rates of its parameters by.

    Raises:
        RecipeError: it does so for optimizers of another kind than this one.
    """
    scales: dict[str, float] = getattr(model, "learning_rate_scales", dict)()
    if scales and not optimizer.unscaled:
        kind = type(optimizer).__module__.rsplit(".", 1)[-1]
        raise RecipeError(
            f"optim.kind: {kind} makes steps of another size than Adam's, and model.config.mup_base_width scales the learning "
            "rates of Adam; use optim.kind=adamw, or leave mup_base_width out"
        )
    return scales


def _declared_groups(model: nn.Module, stack_groups: Iterable[ParamGroup]) -> dict[str, ParamGroup]:
    known = {name for name, _ in model.named_parameters()}
    declared: dict[str, ParamGroup] = {}
    for group in stack_groups:
        unknown = sorted(group.names - known)
        if unknown:
            raise LlmRecipeError(f"a method declares its own learning rate for '{unknown[0]}', which the model does not have")
        twice = sorted(group.names & declared.keys())
        if twice:
            raise LlmRecipeError(f"two methods declare their own learning rate for '{twice[0]}'")
        declared |= dict.fromkeys(group.names, group)
    return declared


def _kinds(model: nn.Module) -> dict[str, str]:
    """Map parameter name -> `adapter` or `embedding`, for those whose kind does not follow from their dimensions."""
    from torch import nn

    from llmrecipe.models.hooks.hook import all_hooks
    from llmrecipe.models.hooks.shared_module import shared_modules

    kinds: dict[str, str] = {}
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(head, nn.Module):
        tables |= {id(p) for p in head.parameters(recurse=False)}
    inside = {id(p) for _, _, _, hook in all_hooks(model) for p in hook.parameters()}
    inside |= {id(p) for _, shared in shared_modules(model) for p in shared.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in inside:
            kinds[name] = "adapter"
        elif id(parameter) in tables and parameter.ndim > 1:
            kinds[name] = "embedding"
    return kinds


def build_optimizer(
    optimizer: Optimizer,
    groups: Sequence[Group],
    divide: Divide | None = None,
) -> torch.optim.Optimizer:
    """Build the torch optimizer for a list of groups.

    Args:
        divide: calls what builds an optimizer with the groups of one process; default: with all of them.

    Raises:
        RecipeError: the optimizer cannot step on the device the parameters are on.
    """
    kind = type(optimizer).__module__.rsplit(".", 1)[-1]
    for device in {p.device.type for group in groups for p in group.parameters}:
        if device not in optimizer.devices:
            raise RecipeError(
                f"optim.kind: {kind} cannot step on the device '{device}' (it runs on {', '.join(optimizer.devices)}); "
                f"use optim.kind=adamw"
            )
    listed: list[dict[str, Any]] = [
        {
            "params": list(group.parameters),
            "names": list(group.names),
            "kind": group.kind,
            "lr": group.lr,
            "initial_lr": group.lr,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]
    return optimizer.build(listed) if divide is None else divide(optimizer.build, listed)


def kernel_flags(params: Sequence[dict[str, Any]], instead: dict[str, bool] | None = None) -> dict[str, bool]:
    """Return the arguments that give a torch optimizer the implementation of the device profile.

    Args:
        params: its groups.
        instead: what it is given where it has no fused kernel; None where it has one.

    Raises:
        RecipeError: the fused kernel is named by key and there is none.
    """
    device = next((p.device for group in params for p in group["params"]), "cpu")
    profile = profile_of(device)
    if profile.optimizer != "fused":
        return {"foreach": profile.optimizer == "foreach"}
    if instead is None:
        return {"fused": True}
    if "optimizer" in profile.chosen:
        raise RecipeError("runtime.optimizer_kernel: this optimizer has no fused kernel here; use auto, foreach or single")
    return instead


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set each group's learning rate to its initial one times the schedule's factor; return the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def numel(shape: Sequence[int]) -> int:
    """Return the number of entries of a shape."""
    count = 1
    for size in shape:
        count *= int(size)
    return count


def joint_optimizer(parts: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Return one optimizer that steps several in turn and shares one state and one list of groups with them."""
    import torch

    class _Joined(torch.optim.Optimizer):
        def __init__(self) -> None:
            self.parts = list(parts)
            super().__init__([group for part in self.parts for group in part.param_groups], {})
            taken = 0
            for part in self.parts:
                size = len(part.param_groups)
                # The parts see the very same dicts, so a new learning rate or a restored state reaches them.
                part.param_groups = self.param_groups[taken : taken + size]
                part.state = self.state
                taken += size

        @overload
        def step(self, closure: None = None) -> None: ...
        @overload
        def step(self, closure: Callable[[], float]) -> float: ...
        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            loss = None if closure is None else torch.enable_grad()(closure)()
            for part in self.parts:
                part.step()
            return loss

    return _Joined()
