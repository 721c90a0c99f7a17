"""The low-rank engine: a branch of rank r added to a frozen weight.

    y = W x + s B A x        A (r, in), B (out, r)

Letters: T tokens, r rank, V vocabulary, D width, E experts. The scale is folded into the last product, `B A` is never formed
in a forward pass (3-D experts excepted, whose host takes an entire tensor), and A and B are float32 master weights cast to the
activation's dtype where they are used.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.methods._engines.biases import add_to_bias, shifted
from llmrecipe.models.hooks.hook import DELTA, Hook, device_of, row_index

if TYPE_CHECKING:
    from llmrecipe.models.site import Site


def branch(x: Tensor, A: Tensor, B: Tensor, scale: float, y: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return y + scale * (x A^T) B^T, (..., out), added to all outputs or to the listed ones."""
    h = F.linear(x, A.to(x.dtype))
    B = B.to(h.dtype)
    if rows is not None:
        return y.index_add(-1, rows, (F.linear(h, B) * scale).to(y.dtype))
    # `flatten` knows the number of tokens also at rank 0 (a module that lost every triplet of AdaLoRA), `reshape` does not.
    flat = torch.addmm(y.reshape(-1, y.shape[-1]).to(h.dtype), h.flatten(0, -2), B.t(), alpha=scale)
    return flat.view(y.shape)


class LowRank(Hook):
    """The branch at a linear layer (Linear, Conv1D, 4- and 8-bit), or at some rows of a fused one."""

    order = DELTA
    rowwise = traceable = True

    rows: Tensor | None
    A0: Tensor | None
    B0: Tensor | None

    def __init__(
        self,
        width_in: int,
        width_out: int,
        r: int,
        scale: float,
        dropout: float = 0.0,
        rows: Tensor | None = None,
        bias: bool = False,
    ):
        super().__init__()
        self.A = nn.Parameter(torch.empty(r, width_in))
        self.B = nn.Parameter(torch.empty(width_out, r))
        self.bias = nn.Parameter(torch.zeros(width_out)) if bias else None
        self.scale = scale
        self.dropout = dropout
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("A0", None)
        self.register_buffer("B0", None)

    @torch.no_grad()
    def resize(self, r: int) -> None:
        """Change the rank, with A and B at zero; a frozen initial copy is dropped."""
        self.A = nn.Parameter(self.A.new_zeros(r, self.A.shape[1]))
        self.B = nn.Parameter(self.B.new_zeros(self.B.shape[0], r))
        self.A0 = self.B0 = None

    @torch.no_grad()
    def start_at(self, A: Tensor, B: Tensor) -> None:
        """Initialize to B A, with a frozen copy that the branch subtracts: W stays as it is and step 0 is the base model."""
        self.A.copy_(A)
        self.B.copy_(B)
        self.A0, self.B0 = self.A.detach().clone(), self.B.detach().clone()

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s (B A dropout(x) + b), (..., out), less the frozen initial copy of a branch that has one."""
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        y = branch(dropped, self.A, self.B, self.scale, y, self.rows)
        if self.A0 is not None and self.B0 is not None:
            y = branch(x, self.A0, self.B0, -self.scale, y, self.rows)
        if self.bias is not None:
            y = shifted(y, (self.bias * self.scale).to(y.dtype), self.rows)
        return y

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Return (A, B, s) with s B A the full change: a frozen initial copy is concatenated with the learned pair."""
        A, B = self.A.detach(), self.B.detach()
        if self.A0 is not None and self.B0 is not None:
            A, B = torch.cat([A, self.A0.to(A)]), torch.cat([B, -self.B0.to(B)], 1)
        return A, B, self.scale

    def vector(self) -> Tensor | None:
        """Return DoRA's magnitudes; None for a plain branch."""
        return None

    def product(self) -> Tensor:
        """Return s (B A - B0 A0) in float32, (out, in)."""
        full = self.B.float() @ self.A.float()
        if self.A0 is not None and self.B0 is not None:
            full = full - self.B0.float() @ self.A0.float()
        return full * self.scale

    def merge(self, module: nn.Module) -> None:
        """Add W <- W + s B A and, where the branch has a bias, the host's b <- b + s b_B; in float32, cast once."""
        add_to_weight(module, self.product(), self.rows)
        if self.bias is not None:
            add_to_bias(module, self.bias.detach() * self.scale, self.rows)


class LowRankEmbedding(Hook):
    """The branch at a token embedding: y = E[x] + c s (A[:, x])^T B^T; c is the module's own scale (Gemma)."""

    order = DELTA
    weightlike = True

    def __init__(self, vocabulary: int, width: int, r: int, scale: float):
        super().__init__()
        self.A = nn.Parameter(torch.empty(r, vocabulary))
        self.B = nn.Parameter(torch.empty(width, r))
        self.scale = scale
        self.embed_scale = 1.0

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + s B A[ids], (..., D); x holds token ids here."""
        h = F.embedding(x, self.A.t()).to(y.dtype)
        return y + F.linear(h, self.B.to(y.dtype)) * (self.scale * self.embed_scale)

    def vector(self) -> Tensor | None:
        """Return DoRA's magnitudes; None for a plain branch."""
        return None

    def product(self) -> Tensor:
        """Return s (B A)^T in float32, (V, D)."""
        return (self.B.float() @ self.A.float()).t() * self.scale

    def merge(self, module: nn.Module) -> None:
        """Add E <- E + s (B A)^T."""
        add_to_weight(module, self.product(), None)


class LowRankTiedHead(Hook):
    """The embedding's branch seen from a tied output head: logits + s (x B) A, with the embedding's own A and B."""

    order = DELTA

    def __init__(self, embedding: LowRankEmbedding):
        super().__init__()
        # In a list, so that the pair stays the embedding's parameters and is not registered twice.
        self.pair = [embedding]

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the logits (..., V) of the shared pair."""
        hook = self.pair[0]
        return y + F.linear(F.linear(x, hook.B.t().to(x.dtype)), hook.A.t().to(x.dtype)).to(y.dtype) * hook.scale

    def merge(self, module: nn.Module) -> None:
        """Do nothing: the tied weight is merged once, at the embedding."""


class LowRankExperts(Hook):
    """One branch an expert of a fused 3-D tensor (E, out, in), or (E, in, out) where the family stores it transposed."""

    order = DELTA

    def __init__(self, experts: int, width_in: int, width_out: int, r: int, scale: float, tensor: str, transposed: bool):
        super().__init__()
        self.A = nn.Parameter(torch.empty(experts, r, width_in))
        self.B = nn.Parameter(torch.empty(experts, width_out, r))
        self.scale = scale
        self.tensor = tensor
        self.transposed = transposed

    def product(self) -> Tensor:
        """Return s B_e A_e in the layout of the host's tensor."""
        full = torch.bmm(self.B, self.A) * self.scale
        return full.transpose(1, 2) if self.transposed else full

    def weight(self, value: Tensor) -> Tensor:
        """Return W_e + s B_e A_e of every expert, in the host's layout."""
        return value + self.product().to(value.dtype)

    def merge(self, module: nn.Module) -> None:
        """Fold every expert's product into the host's tensor."""
        target = getattr(module, self.tensor)
        target.data = (target.float() + self.product().float()).to(target.dtype)


def add_to_weight(module: nn.Module, product: Tensor, rows: Tensor | None) -> None:
    """Add W <- W + product (out, in) in float32, one cast back; handles the transposed storage of Conv1D.

    Raises:
        ModelError: the weight is quantized, so that merging in place would quantize it again.
    """
    weight: Any = module.weight
    if not weight.is_floating_point() or hasattr(weight, "quant_state"):
        raise ModelError("merging into a quantized weight would quantize it again; dequantize the model first (export does)")
    full = weight.data.float()
    product = product.to(full.device)
    if is_transposed(module):
        product = product.t()
        full = full + product if rows is None else full.index_add(1, rows, product)
    else:
        full = full + product if rows is None else full.index_add(0, rows, product)
    weight.data = full.to(weight.dtype)


def is_transposed(module: nn.Module) -> bool:
    """Return whether a layer stores its weight (in, out), as GPT-2's Conv1D does."""
    return type(module).__name__ == "Conv1D"


def wide(x: Tensor) -> Tensor:
    """Cast to float32, or leave float64 where the model computes in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def is_linear_site(site: Site) -> bool:
    """Return whether a site is a linear layer, or some rows of one: no embedding, no fused experts."""
    return site.tensor is None and site.role not in ("embed", "embed.position") and hasattr(site.module, "weight")


def low_rank_hook(site: Site, r: int, scale: float, dropout: float = 0.0, bias: bool = False) -> Hook:
    """Build the low-rank hook that fits a site: linear, fused rows, embedding or 3-D experts.

    Raises:
        ModelError: the site has no weight a low-rank branch can be added to, or no outputs a bias can be added to.
    """
    if bias and (site.tensor is not None or isinstance(site.module, nn.Embedding)):
        raise ModelError(
            f"{site.path}: a bias in the branch (lora_bias) needs a linear layer; leave {site.role} out of the target"
        )
    with torch.device(device_of(site.module)):
        if site.tensor is not None:
            if dropout:
                raise ModelError(
                    f"{site.path}: dropout on the input cannot be factored out of a fused expert tensor; set dropout to 0"
                )
            return LowRankExperts(site.experts, site.width_in, site.width_out, r, scale, site.tensor, site.transposed)
        if isinstance(site.module, nn.Embedding):
            hook = LowRankEmbedding(site.module.num_embeddings, site.module.embedding_dim, r, scale)
            hook.embed_scale = float(getattr(site.module, "scalar_embed_scale", 1.0))
            return hook
        if not hasattr(site.module, "weight") or site.role.startswith("norm"):
            raise ModelError(f"{site.path}: a low-rank branch needs a linear layer, an embedding or an expert tensor")
        return LowRank(site.width_in, site.width_out, r, scale, dropout, row_index(site), bias)


@torch.no_grad()
def init_low_rank(hook: Hook) -> None:
    """Initialize A Kaiming-uniform(a = sqrt 5), B = 0; at embeddings A = 0, B ~ N(0, 1). See `initialization` for others."""
    if isinstance(hook, LowRankTiedHead):
        return
    if isinstance(hook, LowRankEmbedding):
        nn.init.zeros_(hook.A)
        nn.init.normal_(hook.B)
        return
    if not isinstance(hook, LowRank | LowRankExperts):
        raise TypeError(type(hook).__name__)
    start_pair(hook.A, hook.B)


@torch.no_grad()
def start_pair(A: Tensor, B: Tensor) -> None:
    """Fill A Kaiming-uniform(a = sqrt 5), B with zeros; each expert is a matrix of its own, whose fan is the last axis."""
    bound = math.sqrt(6.0 / (6.0 * A.shape[-1]))
    nn.init.uniform_(A, -bound, bound)
    nn.init.zeros_(B)
