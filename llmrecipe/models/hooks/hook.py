"""Hooks: the only way a method touches a forward pass.

A hook is a small module added as a child of the module it changes, under its wrapper's name. The host module's `forward`
becomes `_hooked_forward`, which looks the hooks up by name on the module it is given, so deep copies, checkpoints and
sharded rebuilds keep working, and names of base parameters never change.

Kinds of hook (a hook overrides exactly one method):

    before        x -> x'                    prompts at the embedding, IA3 on an input
    after         (x, y) -> y'               LoRA, adapters, ReFT
    wrap_forward  (call, x) -> y             replaces the call itself: DoRA, CoDA, sparse entries, merged products
    weight        W -> W'                    a named tensor of the host for one call: 3-D experts
    attention     (attend, q, k, v) -> out   prefix tuning, head-wise adapters; see models.attention
    wrap_module   (call, inputs) -> output   the host with all its inputs by name: prompts that lengthen rows, tensors that are
                                             computed once per forward pass for the hooks inside (`Context.shared`)

The order of several at one site stands in `hooks.host`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from llmrecipe.core.forward_context import current
from llmrecipe.models.hooks.shared_module import shared_modules

if TYPE_CHECKING:
    from llmrecipe.models.site import Site

T = TypeVar("T")

ROWS, DELTA, SCALE, SERIAL, EDIT = -10, 0, 10, 20, 30
"""Values of `Hook.order`. ROWS: a `wrap_module` hook that changes rows is outside those that count their columns."""

KINDS = ("before", "after", "wrap_forward", "weight", "attention", "wrap_module")

BELOW_OUTERMOST = "_below_outermost"
"""Attribute of a module whose `forward` was replaced by one that stays outside the hooks: what that one calls, or None."""

ROUTED: set[str] = set()
"""Names in Transformers of attention functions that call attention hooks (see `models.attention.install`)."""


class Hook(nn.Module):
    """Base of every hook."""

    order: ClassVar[int] = DELTA
    owner: str
    """Name of the wrapper (its key in the stack) this hook belongs to; set by `add_hook`."""
    roles: frozenset[str] | None = None
    """Roles this hook serves; None serves every role but `reference`."""
    mounted: bool = False
    """Whether the hook belongs to the run this one continues: it is part of the reference and is never disabled for it."""
    rowwise: ClassVar[bool] = False
    """Whether each row of its output depends on that row of its input alone, whatever its position: then it also works on a
    subset of a batch's rows (see `models.optimizations`)."""
    weightlike: ClassVar[bool] = False
    """Whether host and hook together are again one linear map, or one embedding table, of the same inputs."""
    keeps_input: ClassVar[bool] = True
    """Whether the backward pass of what it trains needs its host's whole input."""
    tensor: str = "weight"
    """For a weight hook: the attribute of the host it changes."""
    in_place: bool = False
    """Whether it writes what it has learned into that tensor of the host, which is frozen itself."""
    once_a_step: ClassVar[bool] = False
    """For a weight hook: whether W' depends on W and trained tensors alone, the same for every user of W. Micro-batches then
    share one W' (see `shared_weights`), which takes a gradient as large as W: only where as much is trained as well."""
    sharing: Callable[[Hashable, Callable[[], Tensor]], Tensor] | None = None
    """What gives the W' of the running step, by whose it is; None forms it in every call."""
    kinds: ClassVar[tuple[str, ...]] = ()
    """The hook methods that its class overrides."""
    traceable: ClassVar[bool] = False
    """Whether `torch.compile` may trace it: its result depends on its tensors, on plain attributes and on `Context.role` and
    `off` alone, and it keeps nothing. Not inherited: a subclass says it for itself. The host of any other hook stands between
    compiled graphs."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Note which hook methods a class overrides."""
        super().__init_subclass__(**kwargs)
        cls.kinds = tuple(kind for kind in KINDS if getattr(cls, kind) is not getattr(Hook, kind))
        cls.traceable = bool(vars(cls).get("traceable", False))

    def active(self) -> bool:
        """Return whether the hook takes part in the forward pass that is running."""
        context = current()
        if self.owner in context.off:
            return False
        if self.roles is not None:
            return context.role in self.roles
        return self.mounted or context.role != "reference"

    def before(self, x: Tensor) -> Tensor:
        """Change the host's input, x (..., D_in) -> x'."""
        raise NotImplementedError

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Change the host's output, (x (..., D_in), y (..., D_out)) -> y'."""
        raise NotImplementedError

    def wrap_forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Compute the host's output in place of `call`, x (..., D_in) -> y (..., D_out)."""
        raise NotImplementedError

    def weight(self, value: Tensor) -> Tensor:
        """Replace a tensor of the host for one call, W -> W' of the same shape."""
        raise NotImplementedError

    def attention(self, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention output (R, Hq, T, Ev); `attend(q, k, v, *prefixes)` computes it without this hook."""
        raise NotImplementedError

    def wrap_module(self, call: Callable[..., T], inputs: dict[str, Any]) -> T:
        """Return what the host returns; `call(**inputs)` computes it without this hook."""
        raise NotImplementedError

    def merge(self, module: nn.Module) -> None:
        """Fold this hook into the weights of its host module.

        Raises:
            NotImplementedError: the hook cannot be folded; its wrapper says so before anything is written.
        """
        raise NotImplementedError


_watching: set[int] | None = None


@contextlib.contextmanager
def recorded_calls() -> Iterator[set[int]]:
    """Collect, in the set that is yielded, the ids of all hooks that take part in a forward pass inside the context."""
    global _watching
    called: set[int] = set()
    _watching = called
    try:
        yield called
    finally:
        _watching = None


def recording() -> bool:
    """Return whether calls of hooks are being recorded."""
    return _watching is not None


def note_called(hooks: Iterable[Hook]) -> None:
    """Record hooks as called, inside `recorded_calls`."""
    if _watching is not None:
        _watching.update(map(id, hooks))


def hook_kind(hook: Hook) -> str:
    """Return which of the hook methods a hook overrides (exactly one)."""
    if len(hook.kinds) != 1:
        raise TypeError(f"{type(hook).__name__} must override exactly one of {', '.join(KINDS)}, not {list(hook.kinds)}")
    return hook.kinds[0]


def hooks_of(module: nn.Module, kind: str | None = None, active: bool = False) -> list[Hook]:
    """Return the hooks of a module in stack order, optionally of one kind and only the active ones."""
    hooks = [getattr(module, name) for name in getattr(module, "_hook_names", ())]
    return [p for p in hooks if (kind is None or hook_kind(p) == kind) and (not active or p.active())]


def all_hooks(model: nn.Module, owner: str | None = None) -> Iterator[tuple[str, nn.Module, str, Hook]]:
    """Yield (module path, module, hook name, hook) for every injected hook, in module order."""
    for path, module in model.named_modules():
        for name in getattr(module, "_hook_names", ()):
            hook = getattr(module, name)
            if owner is None or hook.owner == owner:
                yield path, module, name, hook


def first_tensor(value: Any) -> Tensor:
    """Return the first tensor of a module output, which may be a tuple."""
    return value[0] if isinstance(value, tuple) else value


def with_first(value: Any, tensor: Tensor) -> Any:
    """Return the same output with its first tensor replaced."""
    return (tensor, *value[1:]) if isinstance(value, tuple) else tensor


def own_tensors(model: nn.Module, owner: str) -> list[str]:
    """Return full names of the parameters and persistent buffers of a wrapper's hooks, and of its shared modules."""
    found: list[str] = []
    for path, _, name, hook in all_hooks(model, owner):
        prefix = f"{path}.{name}" if path else name
        found += [f"{prefix}.{key}" for key in hook.state_dict()]
    for name, shared in shared_modules(model, owner):
        state = shared.state_dict(keep_vars=True)
        # Of names that are tied to one tensor the first stands for all, as in `named_parameters`.
        first = {id(tensor): key for key, tensor in reversed(state.items())}
        found += [f"{name}.{key}" for key, tensor in state.items() if first[id(tensor)] == key]
    return found


def row_index(site: Site) -> Tensor | None:
    """Return the output rows of a site in a fused layer as an index tensor (n,), or None where it has all of them."""
    if site.rows is None:
        return None
    rows = range(10**9)[site.rows] if isinstance(site.rows, slice) else site.rows
    return torch.tensor(list(rows), dtype=torch.long, device=device_of(site.module))


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first parameter."""
    return next(module.parameters()).device
