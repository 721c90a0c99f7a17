"""Ports: the only way a method touches a forward pass.

A port is a small module added as a child of the module it changes, under its wrapper's name. The host module's `forward`
becomes `_ported_forward`, which looks the ports up by name on the module it is given, so deep copies, checkpoints and
sharded rebuilds keep working, and names of base parameters never change.

Kinds of port (a port overrides exactly one method):

    before     x -> x'                    prompts at the embedding, IA3 on an input
    after      (x, y) -> y'               LoRA, adapters, ReFT
    around     (call, x) -> y             where the call itself is replaced: DoRA, CoDA, sparse entries, merged products
    weight     W -> W'                    a named tensor of the host for one call: 3-D experts
    attention  (attend, q, k, v) -> out   prefix tuning, head-wise adapters; see models.attention
    whole      (call, inputs) -> output   the host with all its inputs by name: prompts that lengthen rows, tensors that are
                                          computed once a forward pass and handed to the ports inside (`Context.shared`)

Order at one site: wholes outside everything else by `order`, the first one outermost; then befores in stack order, then the
arounds (the last one outermost) with weights replaced by `order`, then the afters by `order`, ties in stack order: parallel
deltas (0), scalings (10), serial bottlenecks (20), edits of the result (30).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.forward_context import current

if TYPE_CHECKING:
    from llmrecipe.models.site import Site

if TYPE_CHECKING:
    from llmrecipe.models.site import Site
if TYPE_CHECKING:
    pass

ROWS, DELTA, SCALE, SERIAL, EDIT = -10, 0, 10, 20, 30
"""Values of `Port.order`. ROWS: a whole that changes rows stands outside those that count their columns."""

KINDS = ("before", "after", "around", "weight", "attention", "whole")

ROUTED: set[str] = set()
"""Attention functions that call attention ports, by the name Transformers knows them by (see `models.attention.install`)."""


class Port(nn.Module):
    """Base of every injected module."""

    order: ClassVar[int] = DELTA
    owner: str
    """Name of the wrapper (its key in the stack) this port belongs to; set by `inject`."""
    roles: frozenset[str] | None = None
    """Roles this port serves; None serves every role but `reference`."""
    mounted: bool = False
    """Whether the port belongs to the run this one continues: it is part of the reference and never steps aside for it."""
    rowwise: ClassVar[bool] = False
    """Whether each row of its output depends on that row of its input alone, wherever the row stands: then it also works on
    some of a batch's rows (see `models.optimizations`)."""
    weightlike: ClassVar[bool] = False
    """Whether host and port together are again one linear map, or one table, of the same inputs (see `weight_below`)."""
    tensor: str = "weight"
    """For a weight port: the attribute of the host it changes."""

    def active(self) -> bool:
        """Whether the port takes part in the forward pass that is running."""
        context = current()
        if self.owner in context.off:
            return False
        if self.roles is not None:
            return context.role in self.roles
        return self.mounted or context.role != "reference"

    def before(self, x: Tensor) -> Tensor:
        """x -> x'."""
        raise NotImplementedError

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """(x, y) -> y'."""
        raise NotImplementedError

    def around(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """(call, x) -> y."""
        raise NotImplementedError

    def weight(self, value: Tensor) -> Tensor:
        """W -> W', for the length of one call of the host."""
        raise NotImplementedError

    def attention(self, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output (R, heads, T, head size); `attend(q, k, v, *prefixes)` computes it without this port."""
        raise NotImplementedError

    def whole(self, call: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """Whatever the host returns; `call(**inputs)` computes it without this port."""
        raise NotImplementedError

    def merge(self, module: nn.Module) -> None:
        """Fold this port into the weights of its host module.

        Raises:
            NotImplementedError: the port cannot be folded; its wrapper says so before anything is written.
        """
        raise NotImplementedError


_watching: set[int] | None = None


@contextlib.contextmanager
def watched_ports() -> Iterator[set[int]]:
    """Inside, the ids of all ports that take part in a forward pass gather in the set that is yielded."""
    global _watching
    called: set[int] = set()
    _watching = called
    try:
        yield called
    finally:
        _watching = None


def note_called(ports: Iterable[Port]) -> None:
    """Count ports as called, where somebody watches."""
    if _watching is not None:
        _watching.update(map(id, ports))


@functools.cache
def _kind(cls: type[Port]) -> str:
    kinds = [kind for kind in KINDS if getattr(cls, kind) is not getattr(Port, kind)]
    if len(kinds) != 1:
        raise TypeError(f"{cls.__name__} must override exactly one of {', '.join(KINDS)}, not {kinds}")
    return kinds[0]


def kind_of(port: Port) -> str:
    """Which of the port methods a port overrides (exactly one)."""
    return _kind(type(port))


def inject(module: nn.Module, name: str, port: Port, owner: str) -> Port:
    """Add a port to a module.

    Args:
        module: the host.
        name: child name; the wrapper's name, with `__part` appended where one module has several sites.
        owner: the wrapper's name.

    Raises:
        ValueError: the module already has a child of that name.
        ModelError: an attention port at a module that would never call it.
    """
    if hasattr(module, name):
        raise ValueError(f"{type(module).__name__} already has a child called '{name}'")
    if kind_of(port) == "attention":
        refuse_unrouted(module, owner)
    port.owner = owner
    port.train(module.training)
    module.add_module(name, port)
    ports = [*getattr(module, "_port_names", ()), name]
    module._port_names = tuple(ports)  # type: ignore[assignment]
    if kind_of(port) != "attention" and "_inner_forward" not in module.__dict__:
        # accelerate and bitsandbytes may already have replaced `forward` on the instance; keep what is there.
        object.__setattr__(module, "_inner_forward", module.__dict__.get("forward"))
        module.forward = types.MethodType(_ported_forward, module)  # type: ignore[method-assign]
    return port


def refuse_unrouted(module: nn.Module, owner: str) -> None:
    """Refuse an attention port where attention is computed without asking Transformers' AttentionInterface.

    A module asks it when a method of its class reads ALL_ATTENTION_FUNCTIONS, and it is given our function when its config
    says so: families that are not built for other backends, linear attention and flash attention are not.

    Raises:
        ModelError: it names the module's class and what works instead.
    """
    given = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if given in ROUTED and asks_interface(type(module)):
        return
    reason = "this model computes it without Transformers' AttentionInterface"
    remedy = "use a method on its linear layers, such as lora, or a model of another family"
    if given == "flash_attention_2":
        reason, remedy = "model.attention=flash_attention_2 leaves no place for it", "set model.attention=sdpa"
    raise ModelError(
        f"stack.{owner}: it changes what attention computes, and {type(module).__name__} would never call it: {reason}. "
        f"Nothing of it would act; {remedy}"
    )


@functools.cache
def asks_interface(cls: type[nn.Module]) -> bool:
    """Whether a method of an attention class reads Transformers' table of attention functions."""
    methods = [inspect.unwrap(m) for base in cls.__mro__ for m in vars(base).values() if inspect.isfunction(m)]
    return any("ALL_ATTENTION_FUNCTIONS" in method.__code__.co_names for method in methods)


def eject(module: nn.Module, name: str) -> None:
    """Take a port out again; the last one restores the module's own forward."""
    delattr(module, name)
    module._port_names = tuple(n for n in module._port_names if n != name)  # type: ignore[assignment,union-attr]
    if not any(kind_of(getattr(module, n)) != "attention" for n in module._port_names):  # type: ignore[union-attr]
        inner = module.__dict__.pop("_inner_forward", None)
        module.__dict__.pop("forward", None)
        if inner is not None:
            module.forward = inner  # type: ignore[method-assign]


def ports_of(module: nn.Module, kind: str | None = None, active: bool = False) -> list[Port]:
    """The ports of a module in stack order, optionally of one kind and only those active now."""
    ports = [getattr(module, name) for name in getattr(module, "_port_names", ())]
    return [p for p in ports if (kind is None or kind_of(p) == kind) and (not active or p.active())]


def all_ports(model: nn.Module, owner: str | None = None) -> Iterator[tuple[str, nn.Module, str, Port]]:
    """Yield (module path, module, port name, port) for every injected port, in module order."""
    for path, module in model.named_modules():
        for name in getattr(module, "_port_names", ()):
            port = getattr(module, name)
            if owner is None or port.owner == owner:
                yield path, module, name, port


def first_tensor(value: Any) -> Tensor:
    """The tensor of a module output that may be a tuple."""
    return value[0] if isinstance(value, tuple) else value


def with_first(value: Any, tensor: Tensor) -> Any:
    """The same output with its first tensor replaced."""
    return (tensor, *value[1:]) if isinstance(value, tuple) else tensor


def _ported_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    ports = [p for p in ports_of(self) if p.active()]
    note_called(p for p in ports if kind_of(p) != "attention")
    inner = self.__dict__.get("_inner_forward") or types.MethodType(type(self).forward, self)
    wholes = sorted((p for p in ports if kind_of(p) == "whole"), key=lambda p: p.order)
    others = any(kind_of(p) not in ("whole", "attention") for p in ports)
    call = functools.partial(_forward_with, self, ports, inner) if others else inner
    if wholes and args:
        names = [n for n in inspect.signature(type(self).forward).parameters if n != "self"]
        args, kwargs = (), {**dict(zip(names, args, strict=False)), **kwargs}
    for port in reversed(wholes):
        call = _with_inputs(port, call)
    return call(*args, **kwargs)


def _with_inputs(port: Port, call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **inputs: port.whole(call, inputs)


def forward_with(module: nn.Module, ports: list[Port], *args: Any, **kwargs: Any) -> Any:
    """The host's forward with these of its ports alone; in the middle of a call, inside `plain_tensors`."""
    inner = module.__dict__.get("_inner_forward") or types.MethodType(type(module).forward, module)
    note_called(ports)
    return _forward_with(module, ports, inner, *args, **kwargs)


def _forward_with(self: nn.Module, ports: list[Port], inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The host's forward with the ports that see its first tensor."""
    if args:
        x, rest, key = args[0], args[1:], None
    else:
        key = next(k for k in ("hidden_states", "input", "x", *kwargs) if isinstance(kwargs.get(k), Tensor))
        x, rest = kwargs.pop(key), ()
    for port in ports:
        if kind_of(port) == "before":
            x = port.before(x)

    extra: list[Any] = []

    def base(value: Tensor) -> Tensor:
        out = inner(value, *rest, **kwargs) if key is None else inner(**{key: value}, **kwargs)
        extra[:] = [out]
        return first_tensor(out)

    call: Callable[[Tensor], Tensor] = base
    for port in ports:
        if kind_of(port) == "around":
            call = _bind(port, call)
    with _replaced_tensors(self, sorted((p for p in ports if kind_of(p) == "weight"), key=lambda p: p.order)):
        y = call(x)
    for port in sorted((p for p in ports if kind_of(p) == "after"), key=lambda p: p.order):
        y = port.after(x, y)
    return with_first(extra[0], y) if extra else y


@contextlib.contextmanager
def _replaced_tensors(module: nn.Module, ports: list[Port]) -> Iterator[None]:
    """The host's tensors as its weight ports want them, for one call."""
    kept: dict[str, Any] = {}
    try:
        for port in ports:
            kept.setdefault(port.tensor, module._parameters[port.tensor])
            # The entry keeps its place in the dictionary, so the order of parameters never changes.
            module._parameters[port.tensor] = port.weight(getattr(module, port.tensor))  # type: ignore[assignment]
        if kept:
            module.__dict__["_kept_tensors"] = kept
        yield
    finally:
        module.__dict__.pop("_kept_tensors", None)
        module._parameters.update(kept)


@contextlib.contextmanager
def plain_tensors(module: nn.Module) -> Iterator[None]:
    """Inside, also in the middle of a call, the host has its own tensors in place of what weight ports made of them."""
    own = module.__dict__.get("_kept_tensors", {})
    replaced = {name: module._parameters[name] for name in own}
    try:
        module._parameters.update(own)
        yield
    finally:
        module._parameters.update(replaced)


def _bind(port: Port, call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: port.around(call, x)


@contextlib.contextmanager
def bracket(modules: Iterable[nn.Module], enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
    """Inside, `enter(module)` runs before and `leave(module)` after every forward of the modules, also one that raises."""
    handles: list[Any] = []
    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(lambda m, _: enter(m), prepend=True))
            handles.append(module.register_forward_hook(lambda m, *_: leave(m), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def merge_ports(model: nn.Module, owner: str) -> int:
    """Fold every port of a wrapper into its host and take it out; returns how many there were.

    Replaced tensors go first, as in the forward pass: what is added to a tensor is added to the one in its place.
    """
    found = sorted(all_ports(model, owner), key=lambda place: kind_of(place[3]) != "weight")
    for _, module, name, port in found:
        port.merge(module)
        eject(module, name)
    return len(found)


def own_tensors(model: nn.Module, owner: str) -> list[str]:
    """Full names of the parameters and persistent buffers inside a wrapper's ports, and of its shared modules."""
    found: list[str] = []
    for path, _, name, port in all_ports(model, owner):
        prefix = f"{path}.{name}" if path else name
        found += [f"{prefix}.{key}" for key in port.state_dict()]
    shared = getattr(model, f"{owner}_shared", None)
    if isinstance(shared, nn.Module):
        found += [f"{owner}_shared.{key}" for key in shared.state_dict()]
    return found


def row_index(site: Site) -> Tensor | None:
    """The output rows a site owns in a fused layer, as an index."""
    if site.rows is None:
        return None
    rows = range(10**9)[site.rows] if isinstance(site.rows, slice) else site.rows
    return torch.tensor(list(rows), dtype=torch.long, device=device_of(site.module))


def device_of(module: nn.Module) -> torch.device:
    """Device of a module's first parameter."""
    return next(module.parameters()).device
