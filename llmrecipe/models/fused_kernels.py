"""Fused kernels of the liger-kernel package: the product of a gated activation, and rotary position embedding.

    gated activation    f(gate) * up        f = silu, or gelu in its tanh form: one kernel instead of two, and f(gate) is not
                                            kept for the backward pass
    rotary embedding    x cos + rotate(x) sin, of queries and keys: one kernel instead of ten

Projections stay modules of their own, so what a stack adds to them goes on to work. Only instances are changed: an activation
gives back what waits for the factor it is multiplied by, and an attention layer's forward finds another function under the name
`apply_rotary_pos_emb`. The library's kernels write into the tensors they are given; they are given copies wherever another
operation may have kept the tensor.

Each part is compared with what it replaces, values and gradients, on the tensors of a short pass of the given model.

Source: Liger Kernel (arXiv 2410.10989).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from llmrecipe.core.errors import ModelError
from llmrecipe.core.lazy import is_installed, load_module
from llmrecipe.models.optimizations import plain_slot, probe_ids, replaces_stock, same
from llmrecipe.models.pretrained import backbone_of
from llmrecipe.models.resolve_class import first_line

KEY = "model.kernels"
ROTATION = "apply_rotary_pos_emb"
"""What attention layers of Transformers call their rotary embedding by."""
GATED, ROTARY = "gated activation", "rotary embedding"
KIND = "_fused_kind"
"""Attribute of an activation that waits for its factor: the name of its kernel."""
PRODUCTS = (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)


@dataclass(frozen=True)
class Kernel:
    """The two passes of a kernel, as the library has them."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


@functools.cache
def load_kernels() -> dict[str, Kernel]:
    """Import the kernels by name: silu and gelu of gated activations, and rotary."""
    gated, wide, rotary = (load_module(f"liger_kernel.ops.{name}") for name in ("swiglu", "geglu", "rope"))
    return {
        "silu": Kernel(gated.swiglu_forward, gated.swiglu_backward),
        "gelu": Kernel(wide.geglu_forward, wide.geglu_backward),
        "rotary": Kernel(rotary.rope_forward, rotary.rope_backward),
    }


def kernels_lacking(device: str) -> str | None:
    """Return what a machine lacks for the kernels; None where nothing."""
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs a CUDA GPU, and the device is {device}"
    absent = [name for name in ("triton", "liger_kernel") if not is_installed(name)]
    return f"needs {' and '.join(absent)}: pip install 'llmrecipe[kernels]'" if absent else None


def check_kernels(named: str, device: str) -> None:
    """Refuse kernels that a key names and this machine cannot run, before any weight is read.

    Raises:
        ModelError: it says what is missing.
    """
    if named == "liger" and (why := kernels_lacking(device)):
        raise ModelError(f"{KEY}: liger {why}; use auto or off")


@dataclass(frozen=True)
class FusedParts:
    """What of a model goes through fused kernels."""

    gated: int = 0
    """Gated activations."""
    rotary: int = 0
    """Attention layers."""
    refused: str = ""
    """Why something does not, where it should."""

    def line(self) -> str:
        """Return the parts in one line; nothing where there are none."""
        counts = ((self.rotary, "rotary embeddings"), (self.gated, "gated activations"))
        parts = [f"{count} {what}" for count, what in counts if count]
        return f"kernels: {' and '.join(parts)} by liger-kernel" if parts else ""


def fuse_kernels(model: nn.Module, named: bool) -> FusedParts:
    """Send gated activations and rotary embeddings of a model through fused kernels, where that gives the same numbers.

    Args:
        named: whether a key says so: what cannot be fused is an error then.

    Raises:
        ModelError: a key says so, and a kernel fails, gives other numbers, or has nothing to compute.
    """
    if any(p.is_meta for p in model.parameters()):
        return FusedParts()
    device = next(model.parameters()).device.type
    refused = kernels_lacking(device)
    found = FusedParts(refused=refused) if refused else _fused(model)
    if named and (why := found.refused or ("" if found.line() else _nothing(model))):
        raise ModelError(f"{KEY}: liger {why}; use auto or off")
    return found


def _nothing(model: nn.Module) -> str:
    return f"has nothing to compute in {type(model).__name__}: no rotary embedding, no product of a gated activation"


def _fused(model: nn.Module) -> FusedParts:
    installed = {GATED: _install_gated(model), ROTARY: _install_rotary(model)}
    probe, failed = _Comparison(), ""
    try:
        with probe.comparing():
            _short_pass(model)
    except Exception as error:  # whatever a compiler of kernels raises
        failed = f"failed in a short pass ({type(error).__name__}: {first_line(error)})"
    for part, modules in installed.items():
        kept = set() if failed or part in probe.unequal else probe.reached[part]
        for module in modules:
            if id(module) not in kept:
                _remove(module)
        installed[part] = [module for module in modules if id(module) in kept]
    if probe.unequal and not failed:
        failed = f"gives other numbers than this model's {' and '.join(sorted(probe.unequal))}"
    return FusedParts(len(installed[GATED]), len(installed[ROTARY]), failed)


@torch.no_grad()
def _short_pass(model: nn.Module) -> None:
    """Call the model's backbone on a few tokens; a model that reads no tokens reaches no kernel.

    Raises:
        Exception: whatever a kernel raised.
    """
    ids = probe_ids(model)
    if ids is None:
        return
    positions = torch.arange(ids.shape[1], device=ids.device)[None] + getattr(model, "position_offset", 0)
    training = model.training
    model.eval()
    try:
        backbone_of(model)(input_ids=ids, position_ids=positions)
    finally:
        model.train(training)


def _remove(module: nn.Module) -> None:
    slot = "_inner_forward" if "_inner_forward" in module.__dict__ else "forward"
    if slot == "forward":
        del module.__dict__[slot]
    else:
        module.__dict__[slot] = None
    module.__dict__.pop(KIND, None)


# --- comparison ------------------------------------------------------------------------------------------------------


@dataclass
class _Comparison:
    """Compares every call of a kernel inside its context with what it replaces, which is what the call returns."""

    current: ClassVar[_Comparison | None] = None
    reached: dict[str, set[int]] = field(default_factory=lambda: {GATED: set(), ROTARY: set()})
    """Part -> ids of the modules that called its kernel."""
    unequal: set[str] = field(default_factory=set)
    """Parts whose kernel gave other numbers."""

    @contextlib.contextmanager
    def comparing(self) -> Iterator[None]:
        """Compare inside the context."""
        _Comparison.current = self
        try:
            yield
        finally:
            _Comparison.current = None

    def compare(
        self, part: str, number: int, stock: Callable[..., Any], fused: Callable[..., Any], given: Sequence[Tensor]
    ) -> Any:  # noqa: ANN401 - what the stock function returns
        """Compare one call, values and gradients, and return what the stock function gives.

        Args:
            number: id of the module that calls.
        """
        self.reached[part].add(number)
        wanted, found = _passes(stock, given), _passes(fused, given)
        if not all(same(own, other) for own, other in zip(found, wanted, strict=True)):
            self.unequal.add(part)
        return stock(*given)


@torch.enable_grad()
def _passes(function: Callable[..., Any], given: Sequence[Tensor]) -> list[Tensor]:
    """Return the values of a function and the gradients of its first two arguments, under seeded gradients of the values."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given[:2]]
    out = function(*leaves, *given[2:])
    values = list(out) if isinstance(out, tuple) else [out]
    seeded = torch.Generator().manual_seed(0)
    pulls = [torch.randn(value.shape, generator=seeded).to(value) for value in values]
    return [*(value.detach() for value in values), *torch.autograd.grad(values, leaves, pulls)]


def _plain(tensors: Sequence[object]) -> bool:
    """Return whether all are tensors with numbers of their own, and not stand-ins for them or parts of sharded ones."""
    return all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)


# --- gated activations -----------------------------------------------------------------------------------------------


class _Gated(torch.autograd.Function):
    """y = f(gate) * up, (..., F), from what is kept of it: gate and up."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, gate: Tensor, up: Tensor) -> Tensor:  # noqa: ANN401 - torch's context
        """Compute the product."""
        ctx.save_for_backward(gate, up)
        ctx.kernel = kernel
        return cast(Tensor, kernel.forward(gate.contiguous(), up.contiguous())[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pull: Tensor) -> tuple[None, Tensor, Tensor]:  # noqa: ANN401
        """Compute both gradients, which the kernel writes over copies of gate and up."""
        gate, up = (kept.clone(memory_format=torch.contiguous_format) for kept in ctx.saved_tensors)
        return None, *ctx.kernel.backward(gate, up, pull.contiguous())


class _Waiting:
    """f(x) before it is computed: a product with it is one kernel, and for anything else it is the tensor."""

    def __init__(self, module: nn.Module, x: Tensor):
        self.module, self.x = module, x

    def computed(self) -> Tensor:
        """Return f(x) as the module computes it."""
        return type(self.module).forward(self.module, self.x)

    def __mul__(self, other: Any) -> Any:  # noqa: ANN401 - what a tensor is multiplied by
        x = self.x
        if not _plain((x, other)) or not _fits_gate(x, other):
            return self.computed() * other
        kernel = load_kernels()[self.module.__dict__[KIND]]
        fused = functools.partial(_Gated.apply, kernel)
        if _Comparison.current is None:
            return fused(x, other)
        forward = functools.partial(type(self.module).forward, self.module)
        return _Comparison.current.compare(GATED, id(self.module), lambda a, b: forward(a) * b, fused, (x, other))

    __rmul__ = __mul__

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - any attribute of a tensor
        return getattr(self.computed(), name)

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Compute a function of torch on f(x), or its product with a tensor."""
        if function in PRODUCTS and len(args) == 2 and not kwargs:
            first, second = args
            return first * second if isinstance(first, _Waiting) else second * first
        args, kwargs = tree_map_only(_Waiting, _Waiting.computed, (args, kwargs or {}))
        return function(*args, **kwargs)


def _fits_gate(gate: Tensor, up: Tensor) -> bool:
    return gate.shape == up.shape and gate.dtype == up.dtype and gate.device == up.device and gate.numel() > 0


@replaces_stock
def _waiting_forward(self: nn.Module, input: Tensor) -> object:
    return _Waiting(self, input)


@torch.no_grad()
def _install_gated(model: nn.Module) -> list[nn.Module]:
    """Have the activations of a model wait for their factor; return those that may have one."""
    found = []
    for module in model.modules():
        if (kind := _kind_of(module)) is not None and plain_slot(module) == "forward":
            module.__dict__[KIND] = kind
            object.__setattr__(module, "forward", types.MethodType(_waiting_forward, module))
            found.append(module)
    return found


def _kind_of(module: nn.Module) -> str | None:
    """Return the kernel of an activation, by its numbers; None of any other module."""
    home = type(module).__module__
    if home not in ("transformers.activations", "torch.nn.modules.activation") or list(module.parameters()):
        return None
    if list(inspect.signature(type(module).forward).parameters)[1:] != ["input"]:
        return None
    x = torch.linspace(-6, 6, 25)
    value = type(module).forward(module, x)
    kinds = {"silu": F.silu(x), "gelu": F.gelu(x, approximate="tanh")}
    return next((kind for kind, wanted in kinds.items() if isinstance(value, Tensor) and same(value, wanted)), None)


# --- rotary embedding ------------------------------------------------------------------------------------------------


class _Rotated(torch.autograd.Function):
    """Rotated queries (R, Hq, T, E) and keys (R, G, T, E); cos and sin (1 or R, T, E') with equal halves, E' <= E."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context
        kernel: Kernel,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Rotate copies of both."""
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), cos.dtype)
        cos, sin = cos.to(dtype), sin.to(dtype)
        ctx.save_for_backward(cos, sin)
        ctx.kernel, ctx.kinds = kernel, (q.dtype, k.dtype)
        q, k = kernel.forward(_own(q, dtype), _own(k, dtype), cos, sin)[:2]
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q: Tensor, k: Tensor) -> tuple[None, Tensor, Tensor, None, None]:  # noqa: ANN401
        """Rotate copies of both gradients back."""
        cos, sin = ctx.saved_tensors
        q, k = ctx.kernel.backward(_own(q, cos.dtype), _own(k, cos.dtype), cos, sin)
        return None, q.to(ctx.kinds[0]), k.to(ctx.kinds[1]), None, None


def _own(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy (R, H, T, E) in the order of the kernel, (R, T, H, E)."""
    rows = x.transpose(1, 2)
    return torch.empty(rows.shape, dtype=dtype, device=x.device).copy_(rows).transpose(1, 2)


def _fits_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if not _plain((q, k, cos, sin)) or (q.dim(), k.dim(), cos.dim()) != (4, 4, 3) or cos.requires_grad or not q.numel():
        return False
    rows, _, length, size = q.shape
    if (k.shape[0], *k.shape[2:]) != (rows, length, size) or cos.shape != sin.shape:
        return False
    return cos.shape[0] in (1, rows) and cos.shape[1] == length and cos.shape[2] <= size and cos.shape[2] % 2 == 0


def _install_rotary(model: nn.Module) -> list[nn.Module]:
    """Give attention layers a forward whose rotary embedding is fused; return them."""
    found = []
    for module in model.modules():
        stock = type(module).forward
        if not inspect.isfunction(stock) or ROTATION not in stock.__code__.co_names or hasattr(stock, "__wrapped__"):
            continue
        if not inspect.isfunction(stock.__globals__.get(ROTATION)) or (slot := plain_slot(module)) is None:
            continue
        object.__setattr__(module, slot, types.MethodType(_rotating(stock, id(module)), module))
        found.append(module)
    return found


def _rotating(stock: types.FunctionType, number: int) -> types.FunctionType:
    """Return a forward with the code of an attention layer's own, in whose namespace rotary embedding is fused."""
    names = dict(stock.__globals__)
    made = types.FunctionType(stock.__code__, names, stock.__name__, stock.__defaults__, stock.__closure__)
    made.__kwdefaults__, made.__dict__ = stock.__kwdefaults__, dict(stock.__dict__)
    names[ROTATION] = functools.partial(_rotate, names[ROTATION], number)
    return replaces_stock(made)


def _rotate(stock: Callable[..., Any], number: int, *given: Any, **more: Any) -> Any:  # noqa: ANN401 - what attention layers pass and get
    if more or len(given) != 4 or not _fits_rotation(*given):
        return stock(*given, **more)
    fused = functools.partial(_Rotated.apply, load_kernels()["rotary"])
    return fused(*given) if _Comparison.current is None else _Comparison.current.compare(ROTARY, number, stock, fused, given)
