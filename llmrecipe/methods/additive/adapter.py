"""Serial adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.option_types import Field, Literal, NonNegativeInt, OpenFraction, PositiveInt, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods._engines.input_gate import InputGate, gate_means, prepare_gates
from llmrecipe.methods.additive._engines import bottleneck
from llmrecipe.models.hooks.hook import device_of
from llmrecipe.models.hooks.host import add_hook
from llmrecipe.models.module_map import anatomy

if TYPE_CHECKING:
    from llmrecipe.methods.additive._engines.bottleneck import Sublayer
    from llmrecipe.models.anatomy import Anatomy
    from llmrecipe.models.site import Site


@register
class Adapter(Wrapper):
    """Serial adapter: A(z) = s (W_u f(W_d z + b_d) + b_u), added after a sublayer's output y before its residual sum.

    houlsby   x' = x + y + A(y), post-norm x' = LN(x + y + A(y)); after attention and feed-forward
    pfeiffer  x' = x + y + A(x + y), post-norm x' = LN(x + y + A(LN(x + y))) with the block's own LN twice; feed-forward only

    Trained: each adapter 2 d r + r + d (with biases; + 1 or d for a learned scale, + 2 d for each own norm), so 2 L and L of
    them; `train_norms` opens the norms of the adapted blocks too. W_u and biases start at zero, so training starts at the base
    model; `init: houlsby` and `bert` are near-identity initializations. Mixtures are adapted after the sum of their
    experts. Sandwich-norm blocks (Gemma): y is the output of the norm that follows the sublayer. Not mergeable: A is no
    linear map.

    `gate` multiplies A(z) by g = sigmoid(w z + b), for hybrids such as UniPELT; d + 1 more train an adapter.

    Papers: Parameter-Efficient Transfer Learning for NLP (arXiv 1902.00751); AdapterFusion, placement (arXiv 2005.00247).
    Departures: zero start of W_u and frozen norms by default (Houlsby et al. train norms: `train_norms: true`); y is read
    before the dropout of families that apply it outside the sublayer's last matrix (BERT, BART, T5), not after it.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    stage: ClassVar[Stage] = Stage.INJECT
    mergeable: ClassVar[bool] = False

    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """Where adapters stand and what they read."""
    r: Rank | None = None
    """Width of the bottleneck; default the model's width over `reduction`."""
    reduction: PositiveInt = 16
    """Width of the model over the width of the bottleneck."""
    sizes: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """Bottleneck by layer number, instead of r; 0 leaves a layer out."""
    layers: str = "*"
    """Blocks that get adapters: a range such as `0:4`, `-1` or `4:`."""
    side: Literal["both", "encoder", "decoder"] = "both"
    """Side of an encoder-decoder model."""
    sublayers: list[Literal["attn", "ffn"]] | None = None
    """Sublayers with an adapter; default both for houlsby, the feed-forward for pfeiffer."""
    cross_attention: bool = False
    """Also after cross-attention (houlsby)."""
    activation: Literal["relu", "gelu", "silu", "tanh", "identity"] = "relu"
    """Nonlinearity of the bottleneck."""
    bias: bool = True
    """Biases of both projections."""
    scale: float | Literal["learned", "channel"] = 1.0
    """Factor s: a number, one trained number, or one trained number a feature."""
    dropout: OpenFraction = 0.0
    """Dropout on the inner activation while training."""
    ln_before: bool = False
    """A trained LayerNorm before the down-projection."""
    ln_after: bool = False
    """A trained LayerNorm after the up-projection."""
    init: Literal["zero_up", "houlsby", "bert"] = "zero_up"
    """Start: exact identity, N(0, 0.01^2) cut at two deviations, or N(0, 0.02^2)."""
    train_norms: bool = False
    """Also train the norms of the adapted blocks."""
    gate: Literal["none", "token", "mean"] = "none"
    """A gate sigmoid(w z + b) of what the adapter reads: a token's own, or a document's mean (UniPELT)."""
    gate_input: Literal["normed", "raw"] = "normed"
    """Whether the gate reads z / rms(z) where z is no norm's output; the stream of a pre-norm block grows with its depth."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Add an adapter after every chosen sublayer.

        Raises:
            ModelError: pfeiffer on a model whose feed-forward shares the residual of attention, or on attention.
        """
        parts = anatomy(model)
        places = [s for s in self.places(parts) if bottleneck.size_of(s, parts.width, self.r, self.reduction, self.sizes)]
        prepare_gates(model, self.name, self.gate, [sub.block for sub in places])
        for sub in places:
            r = bottleneck.size_of(sub, parts.width, self.r, self.reduction, self.sizes)
            with torch.device(device_of(sub.block.module)):
                hook = self._hook(parts, r)
            add_hook(self.host(sub, parts).module, self.name, hook, self.name)

    def _hook(self, parts: Anatomy, r: int) -> bottleneck.Bottleneck:
        behind = self.placement == "houlsby" or parts.pre_norm
        if self.gate == "none":
            return (bottleneck.Behind if behind else bottleneck.BeforeNorm)(parts.width, parts.width, r, self._shape())
        gate = InputGate(parts.width, self.gate, self.name, normalized=behind and self.gate_input == "normed")
        return (bottleneck.GatedBehind if behind else bottleneck.GatedBeforeNorm)(parts.width, r, self._shape(), gate)

    def metrics(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the mean gate of the last forward pass, where there are gates."""
        return gate_means(model, self.name) if self.gate != "none" else {}

    def host(self, sub: Sublayer, parts: Anatomy) -> Site:
        """Return where the adapter acts: at y, at the end of a pre-norm block (x + y), or at the final norm of a post-norm one.

        Raises:
            ModelError: pfeiffer on a post-norm block whose feed-forward has no norm of its own.
        """
        if self.placement == "houlsby":
            return sub.output
        if parts.pre_norm:
            return sub.block
        if sub.norm is None:
            raise ModelError(
                f"{sub.block.path}: pfeiffer needs the norm after the feed-forward, and this block has none of its own"
            )
        return sub.norm

    def places(self, parts: Anatomy) -> list[Sublayer]:
        """Return the sublayers it acts on.

        Raises:
            ModelError: pfeiffer on a model whose feed-forward shares the residual of attention, or on attention.
        """
        names: list[str] = list(self.sublayers or (["attn", "ffn"] if self.placement == "houlsby" else ["ffn"]))
        if self.placement == "pfeiffer":
            if parts.parallel_blocks:
                raise ModelError(
                    f"stack.{self.name}.placement: pfeiffer reads the stream between attention and feed-forward; "
                    f"{parts.family} adds both to one residual, use placement: houlsby"
                )
            if names != ["ffn"] or self.cross_attention:
                raise ModelError(f"stack.{self.name}.sublayers: pfeiffer comes after the feed-forward only")
        if self.cross_attention:
            names.append("cross")
        return bottleneck.sublayers(parts, names, self.layers, None if self.side == "both" else self.side)

    def _shape(self) -> bottleneck.BottleneckShape:
        return bottleneck.BottleneckShape(
            self.activation, self.bias, self.scale, self.dropout, self.ln_before, self.ln_after, self.init
        )

    def starts_at_base(self) -> bool:
        """Return whether step 0 is the base: with `init: zero_up` and frozen norms."""
        return self.init == "zero_up" and not self.train_norms

    def opened(self, model: nn.Module) -> set[str]:
        """Return the norms of the adapted blocks if `train_norms` is on."""
        if not self.train_norms:
            return set()
        parts = anatomy(model)
        blocks = [s.block for s in self.places(parts) if self.sizes.get(str(s.layer), 1)]
        return bottleneck.norm_parameters(model, blocks, parts)

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: 2 d r + r + d train an adapter; AdamW keeps 8 bytes for each."""
        parts = anatomy(model)
        sizes = [bottleneck.size_of(s, parts.width, self.r, self.reduction, self.sizes) for s in self.places(parts)]
        gate = (parts.width + 1) * (self.gate != "none")
        trained = sum(bottleneck.count(parts.width, parts.width, r, self._shape()) + gate for r in sizes if r)
        parameters = dict(model.named_parameters())
        trained += sum(parameters[name].numel() for name in self.opened(model))
        return {"trainable": trained, "optimizer_bytes": 8 * trained, "gradient_bytes": 4 * trained}
