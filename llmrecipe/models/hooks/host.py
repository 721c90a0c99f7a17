"""The host of hooks: how a module gets them, what its forward computes with them, how they are removed or folded into it.

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
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.models.hooks import between_graphs
from llmrecipe.models.hooks.hook import (
    BELOW_OUTERMOST,
    ROUTED,
    Hook,
    all_hooks,
    first_tensor,
    hook_kind,
    hooks_of,
    note_called,
    with_first,
)
from llmrecipe.models.hooks.shared_module import remove_shared


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
