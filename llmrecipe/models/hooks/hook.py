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

Order at one site: module wrappers outside everything else by `order`, the first one outermost; then befores in stack order,
then forward wrappers (the last one outermost) with weights replaced by `order`, then afters by `order`, ties in stack order:
parallel deltas (0), scalings (10), serial bottlenecks (20), edits of the result (30).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import current
from llmrecipe.models.hooks import between_graphs
from llmrecipe.models.hooks.shared_module import remove_shared, shared_modules

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


def add_hook(module: nn.Module, name: str, hook: Hook, owner: str) -> Hook:
    """Add a hook to a module.

    Args:
        module: the host.
        name: child name; the wrapper's name, with `__part` appended where one module has several sites.
        owner: the wrapper's name.

    Raises:
        ValueError: the module already has a child of that name.
        ModelError: an attention hook at a module that would never call it.
    """
    if hasattr(module, name):
        raise ValueError(f"{type(module).__name__} already has a child called '{name}'")
    if hook_kind(hook) == "attention":
        refuse_unrouted(module, owner)
    hook.owner = owner
    hook.train(module.training)
    module.add_module(name, hook)
    hooks = [*getattr(module, "_hook_names", ()), name]
    module._hook_names = tuple(hooks)  # type: ignore[assignment]
    if hook_kind(hook) != "attention" and "_inner_forward" not in module.__dict__:
        # accelerate and bitsandbytes may already have replaced `forward` on the instance; keep what is there.
        object.__setattr__(module, "_inner_forward", module.__dict__.get(_slot(module)))
        _replace_forward(module, types.MethodType(_hooked_forward, module))
    return hook


def _slot(module: nn.Module) -> str:
    """Return the attribute that holds the forward hooks belong to: below a replacement that stays outermost, or `forward`."""
    return BELOW_OUTERMOST if BELOW_OUTERMOST in module.__dict__ else "forward"


def _replace_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Replace a module's forward on the instance, under whatever stays outermost; None restores that of its class."""
    slot = _slot(module)
    if forward is None and slot == "forward":
        module.__dict__.pop(slot, None)
    else:
        object.__setattr__(module, slot, forward)


def refuse_unrouted(module: nn.Module, owner: str) -> None:
    """Refuse an attention hook where attention does not go through Transformers' AttentionInterface.

    A module uses the interface when a method of its class reads ALL_ATTENTION_FUNCTIONS, and its config selects our function.
    Neither holds for families that do not support other backends, for linear attention and for flash attention.

    Raises:
        ModelError: naming the module's class and what works instead.
    """
    given = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if given in ROUTED and needs_interface(type(module)):  # type: ignore[arg-type]
        return
    reason = "this model computes it without Transformers' AttentionInterface"
    remedy = "use a method on its linear layers, such as lora, or a model of another family"
    if given == "flash_attention_2":
        reason, remedy = "model.attention=flash_attention_2 cannot be extended", "set model.attention=sdpa"
    raise ModelError(
        f"stack.{owner}: it changes what attention computes, and {type(module).__name__} would never call it: {reason}. "
        f"It would have no effect; {remedy}"
    )


@functools.cache
def needs_interface(cls: type[nn.Module]) -> bool:
    """Return whether a method of an attention class reads Transformers' table of attention functions."""
    methods = [inspect.unwrap(m) for base in cls.__mro__ for m in vars(base).values() if inspect.isfunction(m)]
    return any("ALL_ATTENTION_FUNCTIONS" in method.__code__.co_names for method in methods)


def remove_hook(module: nn.Module, name: str) -> None:
    """Remove a hook; removing the last one restores the module's own forward."""
    delattr(module, name)
    module._hook_names = tuple(n for n in module._hook_names if n != name)  # type: ignore[assignment,union-attr]
    left = any(hook_kind(getattr(module, n)) != "attention" for n in module._hook_names)  # type: ignore[union-attr]
    if not left and "_inner_forward" in module.__dict__:
        _replace_forward(module, module.__dict__.pop("_inner_forward"))


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


def _hooked_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    hooks = [p for p in hooks_of(self) if p.active()]
    if between_graphs.apart is not None and not all(p.traceable for p in hooks):
        return between_graphs.apart(_with_hooks, self, hooks, args, kwargs)
    return _with_hooks(self, hooks, args, kwargs)


def _with_hooks(self: nn.Module, hooks: list[Hook], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    note_called(p for p in hooks if hook_kind(p) != "attention")
    # Not a method object: `torch.compile` does not trace how one is made.
    inner = self.__dict__.get("_inner_forward") or functools.partial(type(self).forward, self)
    wrappers = sorted((p for p in hooks if hook_kind(p) == "wrap_module"), key=lambda p: p.order)
    others = any(hook_kind(p) not in ("wrap_module", "attention") for p in hooks)
    call = functools.partial(_forward_with, self, hooks, inner) if others else inner
    if wrappers and args:
        names = [n for n in inspect.signature(type(self).forward).parameters if n != "self"]
        call = _by_position(call, names[: len(args)])
        args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
    for hook in reversed(wrappers):
        call = _with_inputs(hook, call)
    return call(*args, **kwargs)


def _by_position(call: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    """Return a call by name that passes on by position what came so: an expert kernel may have other names than its host."""

    def called(**inputs: Any) -> Any:
        kept = list(itertools.takewhile(inputs.__contains__, names))
        return call(*[inputs.pop(name) for name in kept], **inputs)

    return called


def _with_inputs(hook: Hook, call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **inputs: hook.wrap_module(call, inputs)


def forward_with(module: nn.Module, hooks: list[Hook], *args: Any, **kwargs: Any) -> Any:
    """Run the host's forward with only the given hooks; during a call of the host, use it inside `plain_tensors`."""
    inner = module.__dict__.get("_inner_forward") or types.MethodType(type(module).forward, module)
    note_called(hooks)
    return _forward_with(module, hooks, inner, *args, **kwargs)


def _forward_with(self: nn.Module, hooks: list[Hook], inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run the host's forward with the hooks that act on its first tensor."""
    if args:
        x, rest, key = args[0], args[1:], None
    else:
        key = next(k for k in ("hidden_states", "input", "x", *kwargs) if isinstance(kwargs.get(k), Tensor))
        x, rest = kwargs.pop(key), ()
    for hook in hooks:
        if hook_kind(hook) == "before":
            x = hook.before(x)

    extra: list[Any] = []

    def base(value: Tensor) -> Tensor:
        out = inner(value, *rest, **kwargs) if key is None else inner(**{key: value}, **kwargs)
        extra[:] = [out]
        return first_tensor(out)

    call: Callable[[Tensor], Tensor] = base
    for hook in hooks:
        if hook_kind(hook) == "wrap_forward":
            call = _bind(hook, call)
    with _replaced_tensors(self, sorted((p for p in hooks if hook_kind(p) == "weight"), key=lambda p: p.order)):
        y = call(x)
    for hook in sorted((p for p in hooks if hook_kind(p) == "after"), key=lambda p: p.order):
        y = hook.after(x, y)
    return with_first(extra[0], y) if extra else y


@contextlib.contextmanager
def _replaced_tensors(module: nn.Module, hooks: list[Hook]) -> Iterator[None]:
    """Replace the host's tensors by those of its weight hooks, for one call."""
    kept: dict[str, Any] = {}
    try:
        for hook in hooks:
            kept.setdefault(hook.tensor, module._parameters[hook.tensor])
            # The entry keeps its place in the dictionary, so the order of parameters never changes.
            module._parameters[hook.tensor] = _replaced(hook, getattr(module, hook.tensor), hooks)  # type: ignore[assignment]
        if kept:
            module.__dict__["_kept_tensors"] = kept
        yield
    finally:
        module.__dict__.pop("_kept_tensors", None)
        module._parameters.update(kept)


def _replaced(hook: Hook, value: Tensor, hooks: list[Hook]) -> Tensor:
    """Return the W' of one of a host's weight hooks, shared where W is the stored one: no other hook changes that tensor."""
    if hook.sharing is None or value.requires_grad or not torch.is_grad_enabled():
        return hook.weight(value)
    if sum(other.tensor == hook.tensor for other in hooks) > 1:
        return hook.weight(value)
    return hook.sharing((hook.owner, id(value)), lambda: hook.weight(value))


@contextlib.contextmanager
def plain_tensors(module: nn.Module) -> Iterator[None]:
    """Restore, inside the context and even during a call, the host's own tensors in place of those of its weight hooks."""
    own = module.__dict__.get("_kept_tensors", {})
    replaced = {name: module._parameters[name] for name in own}
    try:
        module._parameters.update(own)
        yield
    finally:
        module._parameters.update(replaced)


def _bind(hook: Hook, call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: hook.wrap_forward(call, x)


@torch.no_grad()
def merge_hooks(model: nn.Module, owner: str) -> int:
    """Fold every hook of a wrapper into its host and remove it, its shared modules too; return the number of hooks.

    Replaced tensors go first, as in the forward pass: what is added to a tensor is added to the one in its place.
    """
    found = sorted(all_hooks(model, owner), key=lambda place: hook_kind(place[3]) != "weight")
    for _, module, name, hook in found:
        hook.merge(module)
        remove_hook(module, name)
    remove_shared(model, owner)
    return len(found)


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
