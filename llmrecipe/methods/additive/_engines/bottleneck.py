"""The bottleneck engine: a small network of width r in parallel with or after a sublayer, and its sites.

    A(z) = s (W_u f(W_d z + b_d) + b_u)        W_d (r, in), W_u (out, r)

Letters: d width of the residual stream, r bottleneck. Weights are float32 master weights cast to the activation's dtype where
they are used. A sublayer is y = F(N(x)) (pre-norm) or y = F(x) (post-norm), with x the residual stream that enters it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.methods._engines.input_gate import InputGate
from llmrecipe.models.hooks.hook import DELTA, SERIAL, Hook

if TYPE_CHECKING:
    from llmrecipe.models.anatomy import Anatomy
    from llmrecipe.models.site import Site

Init = Literal["zero_up", "houlsby", "bert"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class BottleneckShape:
    """What every bottleneck of one wrapper has in common."""

    activation: str = "relu"
    bias: bool = True
    scale: float | str = 1.0
    """A number, `learned` (one trained number, starting at 1) or `channel` (one a feature)."""
    dropout: float = 0.0
    """Dropout on the inner activation while training."""
    norm_before: bool = False
    norm_after: bool = False
    init: Init = "zero_up"


class Bottleneck(Hook):
    """The network A. It is a hook without a place; the classes below say what it reads and what it adds to."""

    def __init__(self, width_in: int, width_out: int, r: int, shape: BottleneckShape):
        super().__init__()
        self.down = nn.Parameter(torch.empty(r, width_in))
        self.up = nn.Parameter(torch.empty(width_out, r))
        self.down_bias = nn.Parameter(torch.zeros(r)) if shape.bias else None
        self.up_bias = nn.Parameter(torch.zeros(width_out)) if shape.bias else None
        self.activation = shape.activation
        self.dropout = shape.dropout
        self.fixed = shape.scale if isinstance(shape.scale, float) else 1.0
        trained = {"learned": 1, "channel": width_out}.get(str(shape.scale))
        self.scale = None if trained is None else nn.Parameter(torch.ones(trained))
        self.norm_before = nn.LayerNorm(width_in) if shape.norm_before else None
        self.norm_after = nn.LayerNorm(width_out) if shape.norm_after else None
        init_bottleneck(self.down, self.up, shape.init)

    def network(self, z: Tensor) -> Tensor:
        """Return A(z), (..., in) -> (..., out)."""
        if self.norm_before is not None:
            z = _norm(self.norm_before, z)
        h = ACTIVATIONS[self.activation](F.linear(z, self.down.to(z.dtype), _cast(self.down_bias, z)))
        h = F.dropout(h, self.dropout, self.training) if self.dropout else h
        # A fixed scale is folded into the up-projection, bias included: no tensor of the width of the stream is made for it.
        bias = _cast(self.up_bias, z)
        if self.fixed != 1.0:
            h, bias = h * self.fixed, None if bias is None else bias * self.fixed
        out = F.linear(h, self.up.to(h.dtype), bias)
        if self.scale is not None:
            out = out * self.scale.to(out.dtype)
        return out if self.norm_after is None else _norm(self.norm_after, out)


def _cast(bias: Tensor | None, like: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(like.dtype)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps).to(x.dtype)


@torch.no_grad()
def init_bottleneck(down: Tensor, up: Tensor, init: Init) -> None:
    """Initialize the two matrices; biases start at zero.

    zero_up   W_d Kaiming-uniform(a = sqrt 5), W_u = 0: A is zero
    houlsby   both N(0, 0.01^2), cut at two standard deviations: A is nearly zero
    bert      both N(0, 0.02^2): A is small
    """
    if init == "zero_up":
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        nn.init.zeros_(up)
    elif init == "houlsby":
        for matrix in (down, up):
            nn.init.trunc_normal_(matrix, std=0.01, a=-0.02, b=0.02)
    else:
        for matrix in (down, up):
            nn.init.normal_(matrix, std=0.02)


class Behind(Bottleneck):
    """y -> y + A(y), after a sublayer (Houlsby), or after a pre-norm block, whose output is x + y (Pfeiffer)."""

    order = SERIAL
    rowwise = traceable = True

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the adapted output (..., out)."""
        return y + self.network(y)


class BeforeNorm(Bottleneck):
    """u -> LN(u + A(LN(u))), around the norm that ends a post-norm sublayer (Pfeiffer)."""

    order = SERIAL
    rowwise = True

    def wrap_forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply the same norm twice, (..., d) -> (..., d): once for the adapter to read, once for the result."""
        return call(x + self.network(call(x)))


class GatedBehind(Behind):
    """y -> y + g(y) A(y)."""

    def __init__(self, width: int, r: int, shape: BottleneckShape, gate: InputGate):
        super().__init__(width, width, r, shape)
        self.gate = gate
        self.rowwise = gate.pool == "token"  # type: ignore[misc]

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the adapted output (..., d)."""
        return y + self.gate(y) * self.network(y)


class GatedBeforeNorm(BeforeNorm):
    """u -> LN(u + g(LN(u)) A(LN(u)))."""

    def __init__(self, width: int, r: int, shape: BottleneckShape, gate: InputGate):
        super().__init__(width, width, r, shape)
        self.gate = gate
        self.rowwise = gate.pool == "token"  # type: ignore[misc]

    def wrap_forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply the same norm twice, (..., d) -> (..., d); gate and adapter read its first result."""
        u = call(x)
        return call(x + self.gate(u) * self.network(u))


class Parallel(Bottleneck):
    """y -> y + A(x), in parallel with the module whose input x is what the branch reads."""

    order = DELTA
    rowwise = traceable = True

    rows: Tensor | None

    def __init__(self, width_in: int, width_out: int, r: int, shape: BottleneckShape, rows: Tensor | None = None):
        super().__init__(width_in, width_out, r, shape)
        self.register_buffer("rows", rows, persistent=False)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the sum (..., out), at all outputs or at some rows of a fused layer."""
        out = self.network(x)
        return y + out if self.rows is None else y.index_add(-1, self.rows, out.to(y.dtype))


class Joined(Bottleneck):
    """y -> y + A(u), where a `BranchTap` on another module of the block has seen u on the way here."""

    order = DELTA

    def __init__(self, width: int, r: int, shape: BottleneckShape):
        super().__init__(width, width, r, shape)
        self.seen: list[Tensor] = []

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the sum (..., d); what the tap recorded is used up."""
        if not self.seen:
            raise ModelError("a parallel branch ran before the module it reads; its block is called in an unusual order")
        u = self.seen.pop()
        self.seen.clear()
        return y + self.network(u)


class BranchTap(Hook):
    """x -> x, showing x to a `Joined` branch further on."""

    def __init__(self, branch: Joined):
        super().__init__()
        # In a list, so that the branch is not registered twice; copies of the model copy the pair together.
        self.branch = [branch]

    def before(self, x: Tensor) -> Tensor:
        """Record the input (..., d) and return it unchanged."""
        self.branch[0].seen[:] = [x]
        return x


class HeadParallel(Hook):
    """o_i -> o_i + s f(q_i P_i^T) V_i for each attention head i, before the output projection.

    P (H, r, E) and V (H, r, Ev) have the shape of a prefix's keys and values; f stands where a prefix has a softmax.
    """

    def __init__(self, heads: int, width_in: int, width_out: int, r: int, shape: BottleneckShape):
        super().__init__()
        self.down = nn.Parameter(torch.empty(heads, r, width_in))
        self.up = nn.Parameter(torch.empty(heads, width_out, r))
        self.activation = shape.activation
        self.dropout = shape.dropout
        self.fixed = shape.scale if isinstance(shape.scale, float) else 1.0
        self.scale = None if isinstance(shape.scale, float) else nn.Parameter(torch.ones(1))
        for down, up in zip(self.down, self.up, strict=True):
            init_bottleneck(down, up, shape.init)

    def attention(self, attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return q (R, H, T, E) -> (R, H, T, Ev)."""
        h = ACTIVATIONS[self.activation](q @ self.down.to(q.dtype).transpose(1, 2))
        h = F.dropout(h, self.dropout, self.training) if self.dropout else h
        scale = self.fixed if self.scale is None else self.scale.to(h.dtype)
        return attend(q, k, v) + (h * scale) @ self.up.to(h.dtype).transpose(1, 2)


@dataclass(frozen=True)
class Sublayer:
    """One attention, cross-attention or feed-forward of a block."""

    part: str
    """attn, cross or ffn."""
    side: str
    layer: int
    block: Site
    output: Site
    """Where y leaves it, before the residual sum."""
    input: Site
    """The first module that reads its normed input."""
    norm: Site | None
    """The norm before it (in a parallel block perhaps attention's) or, post-norm, after its residual sum."""


PARTS = {
    "attn": (("norm.attn_post", "attn.o"), ("attn.q_a", "attn.q", "attn.qkv"), "norm.attn"),
    "cross": (("norm.cross_post", "cross.o"), ("cross.q",), "norm.cross"),
    "ffn": (("norm.mlp_post", "mlp.down"), ("mlp.gate", "mlp.up", "mlp.gate_up"), "norm.mlp"),
}
"""Part -> roles of its output, roles of its input (the first that exists), role of its norm."""


def sublayers(parts: Anatomy, names: list[str], layers: str = "*", side: str | None = None) -> list[Sublayer]:
    """Return the sublayers of a model's blocks, in model order.

    Args:
        names: `attn`, `cross` and `ffn`.
        layers: range of the target grammar.
        side: `encoder`, `decoder` or None for both.

    Raises:
        ModelError: the range matches nothing, or a block lacks one of the parts.
    """
    prefix = f"{side}." if side else ""
    found: list[Sublayer] = []
    for block in parts.at(f"{prefix}layers.{layers}.block"):
        inside = {s.role: s for s in parts.sites if s.layer == block.layer and s.side == block.side and s.rows is None}
        for name in names:
            if name == "cross" and not any(r.startswith("cross.") for r in inside):
                continue
            found.append(_sublayer(name, block, inside, parts))
    if not found:
        raise ModelError(f"no {', '.join(names)} in layers {layers} of this model\n{parts.describe()}")
    return found


def _sublayer(name: str, block: Site, inside: dict[str, Site], parts: Anatomy) -> Sublayer:
    outputs, inputs, norm = PARTS[name]
    if name == "ffn" and ("experts" in inside or "mlp" in inside):
        # A mixture is adapted as the sum it returns, not expert by expert; a plain one reads and writes at its module.
        sandwiched = [inside[r] for r in outputs[:1] if r in inside]
        whole = inside.get("mlp")
        if whole is not None:
            after = sandwiched[0] if sandwiched else whole
            return Sublayer(name, block.side, int(block.layer or 0), block, after, whole, _norm_of(norm, inside, parts))
    output = next((inside[r] for r in outputs if r in inside), None)
    entry = next((inside[r] for r in inputs if r in inside), None)
    if output is None or entry is None:
        raise ModelError(f"{block.path}: cannot tell where its {name} sublayer begins and ends\n{parts.describe()}")
    return Sublayer(name, block.side, int(block.layer or 0), block, output, entry, _norm_of(norm, inside, parts))


def _norm_of(role: str, inside: dict[str, Site], parts: Anatomy) -> Site | None:
    return inside.get(role) or (inside.get("norm.attn") if parts.parallel_blocks else None)


def size_of(sub: Sublayer, width: int, r: int | None, reduction: int, sizes: dict[str, int]) -> int:
    """Return the bottleneck of a sublayer: its layer's entry of `sizes`, else r, else max(1, width // reduction); 0 is none."""
    if str(sub.layer) in sizes:
        return sizes[str(sub.layer)]
    return r if r is not None else max(1, width // reduction)


def count(width_in: int, width_out: int, r: int, shape: BottleneckShape) -> int:
    """Return the number of a bottleneck's parameters: r (in + out) + [r + out] + [scale] + [2 in] + [2 out]."""
    scale = {"learned": 1, "channel": width_out}.get(str(shape.scale), 0)
    norms = 2 * width_in * shape.norm_before + 2 * width_out * shape.norm_after
    return r * (width_in + width_out) + (r + width_out) * shape.bias + scale + norms


def norm_parameters(model: nn.Module, blocks: list[Site], parts: Anatomy) -> set[str]:
    """Return names of the norm parameters of some blocks."""
    places = {(b.side, b.layer) for b in blocks}
    names: set[str] = set()
    for site in parts.sites:
        if site.role.startswith("norm.") and (site.side, site.layer) in places:
            names |= {f"{site.path}.{n}" for n, _ in site.module.named_parameters(recurse=False)}
    return names & {n for n, _ in model.named_parameters()}
