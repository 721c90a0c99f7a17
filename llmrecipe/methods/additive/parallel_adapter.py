"""Parallel adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.option_types import Field, Literal, NonNegativeInt, OpenFraction, PositiveInt, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods.additive._engines import bottleneck
from llmrecipe.models.hooks.hook import device_of, row_index
from llmrecipe.models.hooks.host import add_hook
from llmrecipe.models.module_map import anatomy

if TYPE_CHECKING:
    from llmrecipe.methods.additive._engines.bottleneck import Sublayer
    from llmrecipe.models.anatomy import Anatomy
    from llmrecipe.models.site import Site


@register
class ParallelAdapter(Wrapper):
    """Parallel adapter: x' = x + F(N(x)) + A(u), post-norm x' = LN(x + F(x) + A(x)), A(u) = s (W_u f(W_d u + b_d) + b_u).

    The branch reads what a sublayer reads and its result is added to the sublayer's; there is no skip inside it. `input:
    normed` takes u = N(x), `input: residual` the stream x before the norm (the same thing in post-norm blocks).
    `target` adds one branch to each named linear instead: y = W x + A(x). `form: multihead` adds to every attention head
    f(q_i P_i^T) V_i before the output projection: prefix-shaped, without a softmax.

    Trained: 2 d r + r + d a sublayer (+ 1 for a learned scale), r (in + out) + r + out a linear, h r (e_q + e_v) a multi-head
    attention. W_u, V and biases start at zero, so training starts at the base model. Not mergeable: A is no linear map.

    Paper: Towards a Unified View of Parameter-Efficient Transfer Learning (arXiv 2110.04366); one branch a linear as in
    LLM-Adapters (arXiv 2304.01933). Departures: the default reads the normed input, where the paper's pre-norm code reads the
    stream for the feed-forward; multi-head branches read the query attention uses (after rotary positions), not one of their
    own with an extra norm; y is met before the dropout of families that apply it outside the sublayer's last matrix.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    stage: ClassVar[Stage] = Stage.INJECT
    mergeable: ClassVar[bool] = False

    sites: list[Literal["ffn", "attn", "cross"]] = Field(["ffn"])
    """Sublayers with a branch."""
    target: str | None = None
    """Linear layers (target grammar) with a branch each, instead of `sites`."""
    form: Literal["plain", "multihead"] = "plain"
    """One branch a sublayer, or one a head of attention."""
    input: Literal["normed", "residual"] = "normed"
    """What the branch reads in a pre-norm block."""
    r: Rank | None = None
    """Width of the bottleneck (of each head's where multihead); default the model's width over `reduction`."""
    reduction: PositiveInt = 2
    """Width of the model over the width of the bottleneck."""
    sizes: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """Bottleneck by layer number, instead of r; 0 leaves a layer out."""
    layers: str = "*"
    """Blocks that get branches: a range such as `0:4`, `-1` or `4:`."""
    side: Literal["both", "encoder", "decoder"] = "both"
    """Side of an encoder-decoder model."""
    scale: float | Literal["learned"] = 4.0
    """Factor s: a number, or one trained number that starts at 1."""
    activation: Literal["relu", "gelu", "silu", "tanh", "identity"] = "relu"
    """Nonlinearity of the bottleneck."""
    bias: bool = True
    """Biases of both projections (plain form)."""
    dropout: OpenFraction = 0.0
    """Dropout on the inner activation while training."""
    init: Literal["zero_up", "houlsby", "bert"] = "zero_up"
    """Start: exact identity, N(0, 0.01^2) cut at two deviations, or N(0, 0.02^2)."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add a branch in parallel with every chosen site.

        Raises:
            ModelError: a target without a weight matrix, or a multi-head branch on the feed-forward.
        """
        parts = anatomy(model)
        if self.target is not None:
            for site in self._linears(parts):
                with torch.device(device_of(site.module)):
                    hook = bottleneck.Parallel(site.width_in, site.width_out, self._size(site), self._shape(), row_index(site))
                add_hook(site.module, site.name(self.name), hook, self.name)
            return
        for sub in self.places(parts):
            r = bottleneck.size_of(sub, parts.width, self.r, self.reduction, self.sizes)
            with torch.device(device_of(sub.block.module)):
                if r and self.form == "multihead":
                    self._heads(sub, r, parts)
                elif r:
                    self._branch(sub, r, parts)

    def _branch(self, sub: Sublayer, r: int, parts: Anatomy) -> None:
        source = sub.norm if self.input == "residual" and parts.pre_norm else sub.input
        if source is None:
            raise ModelError(f"{sub.block.path}: its {sub.part} sublayer has no norm before it; use input: normed")
        if source.module is sub.output.module:
            add_hook(
                self.host(sub, parts).module,
                self.name,
                bottleneck.Parallel(parts.width, parts.width, r, self._shape()),
                self.name,
            )
            return
        branch = bottleneck.Joined(parts.width, r, self._shape())
        add_hook(self.host(sub, parts).module, self.name, branch, self.name)
        add_hook(source.module, f"{self.name}__{sub.part}_in", bottleneck.BranchTap(branch), self.name)

    def _heads(self, sub: Sublayer, r: int, parts: Anatomy) -> None:
        if sub.part == "ffn":
            raise ModelError(f"stack.{self.name}.form: multihead is parallel to attention; use sites: [attn]")
        inside = [s for s in parts.sites if (s.side, s.layer, s.role) == (sub.side, sub.layer, sub.part)]
        value = next(s for s in parts.sites if (s.side, s.layer, s.role) == (sub.side, sub.layer, f"{sub.part}.o"))
        hook = bottleneck.HeadParallel(parts.heads, parts.head_dim, value.width_in // parts.heads, r, self._shape())
        add_hook(inside[0].module, self.name, hook, self.name)

    def host(self, sub: Sublayer, parts: Anatomy) -> Site:
        """Return where a branch parallel to a sublayer is added."""
        return sub.output

    def places(self, parts: Anatomy) -> list[Sublayer]:
        """Return the sublayers with a branch."""
        return bottleneck.sublayers(parts, list(self.sites), self.layers, None if self.side == "both" else self.side)

    def _linears(self, parts: Anatomy) -> list[Site]:
        found = [s for s in parts.at(str(self.target)) if self.sizes.get(str(s.layer), 1)]
        for site in found:
            if site.tensor is not None or not hasattr(site.module, "weight") or site.role.startswith(("norm", "embed")):
                raise ModelError(f"stack.{self.name}.target: {site.path} is no linear layer; use sites for whole sublayers")
        return found

    def _size(self, site: Site) -> int:
        given = self.sizes.get(str(site.layer), self.r)
        return given if given is not None else max(1, site.width_in // self.reduction)

    def _shape(self) -> bottleneck.BottleneckShape:
        return bottleneck.BottleneckShape(self.activation, self.bias, self.scale, self.dropout, init=self.init)

    def starts_at_base(self) -> bool:
        """Return whether step 0 is the base: with `init: zero_up`."""
        return self.init == "zero_up"

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms (see the class); AdamW keeps 8 bytes for each."""
        parts, shape = anatomy(model), self._shape()
        if self.target is not None:
            trained = sum(bottleneck.count(s.width_in, s.width_out, self._size(s), shape) for s in self._linears(parts))
        else:
            trained = sum(self._count(sub, parts, shape) for sub in self.places(parts))
        return {"trainable": trained, "optimizer_bytes": 8 * trained, "gradient_bytes": 4 * trained}

    def _count(self, sub: Sublayer, parts: Anatomy, shape: bottleneck.BottleneckShape) -> int:
        r = bottleneck.size_of(sub, parts.width, self.r, self.reduction, self.sizes)
        if not r or self.form == "plain":
            return bottleneck.count(parts.width, parts.width, r, shape) if r else 0
        value = next(s for s in parts.sites if (s.side, s.layer, s.role) == (sub.side, sub.layer, f"{sub.part}.o"))
        return parts.heads * r * (parts.head_dim + value.width_in // parts.heads) + (self.scale == "learned")
