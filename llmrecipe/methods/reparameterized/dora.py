"""DoRA."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.option_types import Field, Literal, OpenFraction, PositiveFloat, PositiveInt, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.late_answers import arrive
from llmrecipe.methods._base.method import ParamGroup, Stage, Wrapper
from llmrecipe.methods._engines import low_rank
from llmrecipe.methods._engines.biases import BiasMaster, open_biases
from llmrecipe.methods._engines.dora_norm import Gain
from llmrecipe.methods._engines.effective_weight import hooks_under, weight_below
from llmrecipe.methods.reparameterized.lora import pattern_value
from llmrecipe.models.hooks.hook import Hook, all_hooks, device_of, row_index
from llmrecipe.models.hooks.host import add_hook, merge_hooks
from llmrecipe.models.module_map import anatomy

if TYPE_CHECKING:
    from llmrecipe.models.site import Site

CANCELLED = 1e-3
"""Share of ||w||^2 below which the three-term norm of a row has lost its digits and is computed from the row itself."""


NEAR = 4e-3
"""The share from which on rows are computed so where an answer comes two steps late."""


def squared_norm_of_sum(squares: Tensor, WA: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return squared row norms (out,) of W + s B A unformed: ||w||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>.

    Args:
        squares: (out,) ||w||^2 of each row.
        WA: (out, r) W A^T.

    Returns:
        (out,) float32 or wider, without digits where the terms cancel.
    """
    A, B, WA = (low_rank.wide(t) for t in (A, B, WA))
    return squares + 2 * scale * (WA * B).sum(1) + scale**2 * ((B @ (A @ A.t())) * B).sum(1)


def norm_of_sum(squares: Tensor, WA: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return row norms (out,) of W + s B A, NaN where the terms cancel (see `squared_norm_of_sum`)."""
    total = squared_norm_of_sum(squares, WA, A, B, scale)
    return torch.where(total < CANCELLED * squares, torch.nan, total).sqrt()


class _Direction(Gain):
    """The two hooks whose direction learns: g = m / ||W + s B A||."""

    A: nn.Parameter
    B: nn.Parameter
    scale: float

    def norm(self, product: Callable[[], Tensor] | None) -> Tensor:
        """Return ||W + s B A||, (out,), without forming the sum where its digits allow."""
        assert product is not None
        if self.late.answers(self.magnitude):
            return self._norm_unread(product())
        norm = norm_of_sum(self.squares(), product(), self.A, self.B, self.scale)
        lost = norm.isnan()
        if bool(lost.any()):
            rows = self.weight_rows()[lost] + self.scale * (low_rank.wide(self.B)[lost] @ low_rank.wide(self.A))
            norm = norm.masked_scatter(lost, rows.norm(dim=1))
        return norm

    def _norm_unread(self, product: Tensor) -> Tensor:
        """Return the norm without waiting to know whether digits are lost: of every row itself where some were about to be.

        Terms that cancel in the two steps until that is known give what is left of them at least the root of `CANCELLED`.
        """
        squares = self.squares()
        total = squared_norm_of_sum(squares, product, self.A, self.B, self.scale)
        norm = torch.maximum(total, CANCELLED * squares).sqrt()
        if self.late.answer("lost", (total < NEAR * squares).any()):
            rows = self.weight_rows() + self.scale * (low_rank.wide(self.B) @ low_rank.wide(self.A))
            norm = torch.where(total < NEAR * squares, rows.norm(dim=1), norm)
        return norm


class DoraLinear(_Direction, low_rank.LowRank):
    """y + (g - 1) (W x) + g s B A x at a linear layer, quantized or not, or at some rows of a fused one."""

    after = Hook.after  # it replaces the call instead: the norm needs the bare layer

    def __init__(self, site: Site, r: int, scale: float, dropout: float, dropout_mode: str, detach_norm: bool):
        super().__init__(site.width_in, site.width_out, r, scale, dropout, row_index(site))
        self.magnitude = nn.Parameter(torch.empty(site.width_out))
        # In a list: the host is this hook's parent, not its child.
        self.host = [site.module]
        self.dropout_mode, self.detach_norm = dropout_mode, detach_norm

    def wrap_forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return the scaled and adapted output (..., out)."""
        bias = getattr(self.host[0], "bias", None)

        def bare(value: Tensor) -> Tensor:
            out = call(value)
            out = out if bias is None else out - bias
            return out if self.rows is None else out.index_select(-1, self.rows)

        # A's rows go through the layer as if they were tokens: W A^T without ever holding W in full precision.
        gain = self.gain(lambda: bare(self.A.to(x.dtype)).t())
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        direct = bare(dropped) if dropped is not x and self.dropout_mode == "reference" else None
        y = call(x)
        if direct is not None:
            change = self.rescaled(self._moved(dropped, direct), gain, None) - direct
            return y + change if self.rows is None else y.index_add(-1, self.rows, change)
        if self.rows is None:
            return self.rescaled(self._moved(dropped, y), gain, bias)
        own = self._moved(dropped, y.index_select(-1, self.rows))
        return y.index_copy(-1, self.rows, self.rescaled(own, gain, None if bias is None else bias[self.rows]))

    def _moved(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s B A x, (..., out)."""
        return low_rank.branch(x, self.A, self.B, self.scale, y).to(y.dtype)

    def vector(self) -> Tensor | None:
        """Return magnitudes (out,) of the entire layer: those of rows without a branch are their norms."""
        if self.rows is None:
            return self.magnitude.detach()
        return weight_below(self.host[0], self).norm(dim=1).index_copy(0, self.rows, self.magnitude.detach())

    def merge(self, module: nn.Module) -> None:
        """Set W <- g (W + s B A) in float32, one cast back."""
        old = self.weight_rows()
        gain = self.gain(lambda: old @ self.A.float().t())
        low_rank.add_to_weight(module, gain[:, None] * (old + self.product()) - old, self.rows)


class DoraEmbedding(_Direction, low_rank.LowRankEmbedding):
    """g (E[x] + s (A[:, x])^T B^T) at a token embedding; one magnitude a dimension."""

    def __init__(self, site: Site, r: int, scale: float, detach_norm: bool):
        super().__init__(site.width_in, site.width_out, r, scale)
        self.magnitude = nn.Parameter(torch.empty(site.width_out))
        self.host, self.detach_norm = [site.module], detach_norm
        self.embed_scale = float(getattr(site.module, "scalar_embed_scale", 1.0))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the scaled and adapted embeddings (..., D); x holds token ids here."""
        gain = self.gain(lambda: (self.A.float() @ self.weight_rows().t()).t())
        return self.rescaled(super().after(x, y), gain, None)

    def vector(self) -> Tensor | None:
        """Return the magnitudes (D,)."""
        return self.magnitude.detach()

    def merge(self, module: nn.Module) -> None:
        """Set E <- g (E + s (B A)^T)."""
        old = self.weight_rows().t()
        gain = self.gain(lambda: (self.A.float() @ old).t())
        low_rank.add_to_weight(module, gain * (old + self.product()) - old, None)


class Magnitude(Gain, Hook):
    """m / ||W|| (W x) at a linear layer or an embedding: the direction stays the base's, one magnitude an output trains."""

    rows: Tensor | None

    def __init__(self, site: Site):
        super().__init__()
        self.magnitude = nn.Parameter(torch.empty(site.width_out))
        self.register_buffer("rows", row_index(site), persistent=False)
        # In a list: the host is this hook's parent, not its child.
        self.host = [site.module]
        self.width_in = site.width_in

    @property
    def embeds(self) -> bool:
        """Return whether the host is an embedding, whose outputs are the columns of its weight."""
        return isinstance(self.host[0], nn.Embedding)

    def norm(self, product: Callable[[], Tensor] | None) -> Tensor:
        """Return ||W||, (out,)."""
        return self.squares().sqrt()

    def wrap_forward(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return y + (g - 1) (W x), (..., out), g = m / ||W||; the bias is not scaled."""
        y = call(x)
        gain = self.gain()
        bias = None if self.embeds else getattr(self.host[0], "bias", None)
        if self.rows is None:
            return self.rescaled(y, gain, bias)
        own = self.rescaled(y.index_select(-1, self.rows), gain, None if bias is None else bias[self.rows])
        return y.index_copy(-1, self.rows, own)

    def branch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (A, B, m) of the DoRA that is the same function: a pair of zeros at rank 1, and all the layer's magnitudes."""
        if self.rows is None:
            m = self.magnitude.detach()
        else:
            norms = weight_below(self.host[0], self).norm(dim=1)
            m = norms.index_copy(0, self.rows, self.magnitude.detach())
        return m.new_zeros(1, self.width_in), m.new_zeros(len(m), 1), m

    def merge(self, module: nn.Module) -> None:
        """Set W <- g W in float32, one cast back."""
        old = self.weight_rows()
        change = (self.gain()[:, None] - 1) * old
        low_rank.add_to_weight(module, change.t() if self.embeds else change, self.rows)


@register
class Dora(Wrapper):
    """DoRA: W' = m V / ||V||, V = W + s B A, s = alpha / r; one magnitude m an output, LoRA moves the direction.

    With g = m / ||V||: y = y_base + (g - 1) (W x) + g s B A x. A (r, in) starts Kaiming-uniform, B (out, r) at zero, m at ||W||
    of the weight as the layer computes it, so step 0 is the base also on 4-bit weights (QDoRA: stack=[nf4,dora]). A, B and m
    train, m without weight decay; the norm is a constant to the gradient (section 4.3 of the paper). ||V|| comes from
    ||w||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>, with W A^T made by sending A's rows through the frozen layer: no B A and no
    dequantized W exist, and one computation serves all micro-batches of a step. Merging W <- g (W + s B A) is exact up to
    rounding; the change has full rank, so there is no LoRA export. Sites of `magnitude_only` train m alone, without a pair:
    W' = m W / ||W||; PEFT folders hold them as DoRA with a pair of zeros at rank 1. For the gradient of m each output is kept
    in addition to what LoRA keeps; values and the halves of a gated feed-forward the model keeps anyway.

    Paper: DoRA: Weight-Decomposed Low-Rank Adaptation (arXiv 2402.09353). The norm runs over the inputs of each output, as in
    its code.
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    stage: ClassVar[Stage] = Stage.INJECT
    mergeable: ClassVar[bool] = True
    held_by_values: ClassVar[bool] = True

    target: str = "attn.q|v"
    """Sites whose weight is decomposed: linear layers and the embedding."""
    magnitude_only: str | None = None
    """Sites that train only their magnitudes; one that `target` names too gets no pair."""
    r: Rank = 8
    """Rank of A and B."""
    alpha: PositiveFloat = 16.0
    """The branch is scaled by alpha / r."""
    dropout: OpenFraction = 0.0
    """Dropout while training; above 0 `dropout_mode: reference` costs a second product with W."""
    dropout_mode: Literal["reference", "lora_only"] = "reference"
    """reference: the rescaled W x also reads the dropped input, as in the paper's code; lora_only: only the branch does."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r)."""
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    """Rank by site path: regular expressions matched against the end of the module path."""
    alpha_pattern: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Alpha by site path, like rank_pattern."""
    detach_norm: bool = True
    """Treat ||V|| as a constant in the backward pass; false is the exact gradient, for study."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the base that train too: none, all of them, or those of the decomposed layers. No magnitude scales them."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Decompose the weight of every site of `target`.

        Raises:
            ModelError: a site is neither a linear layer nor an embedding, or one side of a tied pair.
        """
        parts = anatomy(model)
        bare = parts.at(self.magnitude_only) if self.magnitude_only is not None else []
        for site in bare:
            self._check(site)
            with torch.device(device_of(site.module)):
                magnitude = Magnitude(site)
            self._place(site, magnitude)
        paired = [site for site in parts.at(self.target) if site.key not in {s.key for s in bare}]
        for site in paired:
            r = pattern_value(self.rank_pattern, site.path, self.r, f"stack.{self.name}.rank_pattern")
            alpha = pattern_value(self.alpha_pattern, site.path, self.alpha, f"stack.{self.name}.alpha_pattern")
            hook = self._hook(site, r, alpha / (math.sqrt(r) if self.use_rslora else r))
            low_rank.init_low_rank(hook)
            self._place(site, hook)
        named = self.target if self.magnitude_only is None else f"{self.target} + {self.magnitude_only}"
        open_biases(model, self.name, self.bias, named, [*bare, *paired])

    def _place(self, site: Site, hook: DoraLinear | DoraEmbedding | Magnitude) -> None:
        """Initialize a hook and add it."""
        # A skeleton has no weight to take a norm of.
        if not site.module.weight.is_meta:
            hook.start()
        for below in hooks_under(site.module, hook):
            # It was computed without a bias, which may have moved the last digit of its norms.
            if isinstance(below, Gain):
                below.cached = None
        add_hook(site.module, site.name(self.name), hook, self.name)

    def _check(self, site: Site) -> None:
        if site.tensor is not None or not hasattr(site.module, "weight") or site.role.startswith("norm"):
            raise ModelError(f"stack.{self.name}: {site.path} is not a linear layer or embedding; dora has no norm of its rows")

    def _hook(self, site: Site, r: int, scale: float) -> DoraLinear | DoraEmbedding:
        self._check(site)
        with torch.device(device_of(site.module)):
            if isinstance(site.module, nn.Embedding):
                return DoraEmbedding(site, r, scale, self.detach_norm)
            return DoraLinear(site, r, scale, self.dropout, self.dropout_mode, self.detach_norm)

    def before_step(self, model: nn.Module, step: int) -> bool | None:
        """Forget cached norms: some optimizers write parameters without telling autograd."""
        self._forget(model)
        return None

    def after_step(self, model: nn.Module, step: int) -> None:
        """Forget cached norms; the questions of this step are sent for, those of the last step are answered."""
        arrive([hook.late for hook in self._forget(model)])

    def _forget(self, model: nn.Module) -> list[Gain]:
        found: list[Gain] = [hook for _, _, _, hook in all_hooks(model, self.name) if isinstance(hook, Gain)]
        for hook in found:
            hook.forget()
        return found

    def groups(self, model: nn.Module) -> list[ParamGroup]:
        """Return magnitudes with weight decay 0: decay would pull every weight to zero."""
        hooks = [place for place in all_hooks(model, self.name) if not isinstance(place[3], BiasMaster)]
        names = {f"{path}.{name}.magnitude" if path else f"{name}.magnitude" for path, _, name, _ in hooks}
        return [ParamGroup(frozenset(names), weight_decay=0.0)]

    def merge(self, model: nn.Module) -> None:
        """Set W <- g (W + s B A) at every site, W <- g W where only magnitudes train; b <- the trained b."""
        merge_hooks(model, self.name)

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: r (in + out) + out train, or out for magnitudes, and biases; AdamW keeps 8 bytes for each."""
        count = sum(n for _, n in self.describe(model))
        return {"trainable": count, "optimizer_bytes": 8 * count, "gradient_bytes": 4 * count}
