"""Initialization of a low-rank pair: at random, from the weight it is added to, or from the layer's behaviour on data.

    default         A Kaiming-uniform(a = sqrt 5), B = 0; embeddings A = 0, B ~ N(0, 1)
    gaussian        A ~ N(0, 1 / r^2), B = 0; embeddings as above
    orthogonal      A and B from one orthogonal matrix, with B A = 0
    pissa           s B A = the leading r singular triplets of W, the root of each singular value in A and in B
    pissa_niter_N   the same from N power iterations on a random sketch of W: faster, approximate
    olora           W = Q R (Householder), B = Q[:, :r], A = R[:r]
    mica            B = the r minor left singular vectors of W, frozen; A = 0
    loftq           s B A = the leading r singular triplets of W - W_hat, where the layer computes with W_hat, W in 4 or 8 bits;
                    further iterations: W_hat = the codes nearest to W - s B A, then A and B again
    eva             A = the leading r principal directions of the layer's inputs, B = 0
    corda           s B A = the leading r triplets of W C, times C^-1, with C = mean of x^T x over the layer's inputs;
    corda_kpm       the same from the last r triplets, which keeps what the inputs show
    lora_ga         dL/dW = U S V^T: A = g V[:r], B = g U[:, r:2r], g = out^(1/4) / gamma^(1/2), gamma = 16

Shapes: W (out, in), A (r, in), B (out, r), C (in, in). pissa, olora, corda and lora_ga start away from B A = 0; their first
product is kept frozen and subtracted, so W itself stays untouched (`LowRank.start_at`). The functions here are pure; `learned`
gathers the data for the last five.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.methods._engines import low_rank
from llmrecipe.methods._engines.low_rank import LowRank, LowRankEmbedding, LowRankExperts
from llmrecipe.methods._engines.quantized import bits_of
from llmrecipe.models.random_state import random_state_kept

if TYPE_CHECKING:
    from llmrecipe.models.site import Site

FROM_DATA = ("loftq", "eva", "corda", "corda_kpm", "lora_ga")
"""Data-dependent initializations, computed before step 0 (see `data_init`)."""
SUBTRACTED = ("corda", "corda_kpm", "lora_ga")
"""Those of them whose first product is subtracted."""
EVERYWHERE = ("default", "gaussian")
"""Initializations that embeddings and fused experts have too."""
GAMMA = 16.0
DAMPING, INVERTED = 0.01, 0.05
"""Share of C's mean diagonal that is first added to it, and the error of C C^-1 from which on that share is doubled."""


def check_init(site: Site, init: str, r: int) -> None:
    """Refuse an initialization that the site cannot have: nothing starts otherwise than the recipe says.

    Raises:
        ModelError: the start is one for linear layers, or for quantized ones, and the site is none; or it takes its r ranks
            from a matrix that has fewer.
    """
    embeds, fused = isinstance(site.module, nn.Embedding), site.tensor is not None
    if init not in EVERYWHERE and (fused or (embeds and init != "mica")):
        what = "a fused expert tensor" if fused else "an embedding"
        raise ModelError(
            f"{site.path}: init: {init} is a start for linear layers, and this is {what}; take {site.role} out of the target "
            f"and give it a LoRA of its own, such as '+stack.more={{kind: lora, target: {site.role.partition('.')[0]}}}'"
        )
    if init == "loftq" and bits_of(site.module) is None:
        raise ModelError(
            f"{site.path}: init: loftq makes up for the rounding of a quantized weight, and this one is not; put nf4 or int8 "
            "into the stack, or leave this layer out of the target"
        )
    if init not in (*EVERYWHERE, "orthogonal"):
        _enough_ranks(r, site.width_out, site.width_in, init)


@torch.no_grad()
def init_hook(hook: nn.Module, init: str, module: nn.Module) -> None:
    """Initialize a hook; values that depend on data (`FROM_DATA`) follow with the data and are the default's until then.

    Raises:
        ModelError: orthogonal with an odd rank, or a start from the weight, which is quantized.
    """
    low_rank.init_low_rank(hook)  # type: ignore[arg-type]
    if init == "gaussian" and isinstance(hook, LowRank | LowRankExperts):
        nn.init.normal_(hook.A, std=1.0 / hook.A.shape[-2])
    elif init == "mica" and isinstance(hook, LowRank | LowRankEmbedding):
        hook.A.zero_()
        hook.B.copy_(minor(weight_of(hook, module, init), hook.A.shape[0]))
    elif not isinstance(hook, LowRank):
        return
    elif init == "orthogonal":
        _orthogonal(hook)
    elif init == "olora":
        q, upper = torch.linalg.qr(weight_of(hook, module, init))
        r = hook.A.shape[0]
        hook.start_at(upper[:r], q[:, :r])
    elif init.startswith("pissa"):
        iterations = re.fullmatch(r"pissa_niter_(\d+)", init)
        hook.start_at(*leading(weight_of(hook, module, init), hook, int(iterations[1]) if iterations else None))
    elif init in SUBTRACTED:
        hook.start_at(hook.A, hook.B)


def leading(matrix: Tensor, hook: LowRank, iterations: int | None = None) -> tuple[Tensor, Tensor]:
    """Return (A, B) with s B A the best approximation of a matrix (out, in) at the hook's rank.

    Args:
        iterations: power iterations on a random sketch instead of the exact decomposition.
    """
    r = hook.A.shape[0]
    if iterations is None:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(matrix, r, niter=iterations)
        vh = v.t()
    root = (s[:r] / hook.scale).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


def minor(weight: Tensor, r: int) -> Tensor:
    """Return the left singular vectors (out, r) of the r smallest singular values."""
    return torch.linalg.svd(weight, full_matrices=False)[0][:, -r:]


def from_gradient(gradient: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return LoRA-GA's (A, B) from dL/dW (out, in): the first r right and the next r left singular vectors, scaled by g."""
    with random_state_kept(gradient.device):
        torch.manual_seed(0)  # the sketch is the same on every process
        u, _, v = torch.svd_lowrank(gradient, min(4 * r, *gradient.shape), niter=4)
    gain = gradient.shape[0] ** 0.25 / GAMMA**0.5
    return gain * oriented(v[:, :r].t())[0], gain * oriented(u[:, r : 2 * r].t())[0].t()


def from_covariance(weight: Tensor, covariance: Tensor, hook: LowRank, last: bool) -> tuple[Tensor, Tensor]:
    """Return CorDA's (A, B) from U S V^T = W C: A = (S / s)^(1/2) V^T C^-1, B = U (S / s)^(1/2), at r first or last triplets.

    C gets a share of its mean diagonal added, doubled until its inverse is one.
    """
    damping, unit = DAMPING, torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    while True:
        damped = covariance + unit * (covariance.diagonal().mean() * damping)
        inverse = torch.linalg.inv(damped)
        if float(torch.dist(damped @ inverse, unit)) < INVERTED:
            break
        damping *= 2
    u, s, vh = torch.linalg.svd(weight.to(damped.dtype) @ damped, full_matrices=False)
    r = hook.A.shape[0]
    part = slice(-r, None) if last else slice(r)
    root = (s[part] / hook.scale).sqrt()
    A, signs = oriented(root[:, None] * (vh[part] @ inverse))
    return A, u[:, part] * root * signs


def oriented(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors (r, n) with the largest entry of each positive, and the signs (r,) that made them so.

    A decomposition leaves signs open: sums in another order, on more processes, would give others.
    """
    signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    return rows * signs, signs[:, 0]


def principal(count: int, total: Tensor, gram: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the principal directions of n rows x from n, sum x (in,) and sum x^T x (in, in).

    Returns:
        (k, in) directions and (k,) shares of the variance, largest first, k <= `most`.
    """
    mean = total / count
    values, vectors = torch.linalg.eigh(gram - count * torch.outer(mean, mean))
    shares = values.flip(0).clamp_min(0) / values.clamp_min(0).sum()
    return oriented(vectors.flip(1)[:, :most].t())[0], shares[:most]


def distribute(shares: list[Tensor], budget: int) -> list[int]:
    """Return EVA's ranks: how many of the `budget` largest shares each layer has; ties go to the earlier one."""
    owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(shares)])
    best = torch.sort(torch.cat([s.cpu() for s in shares]), descending=True, stable=True).indices[:budget]
    return torch.bincount(owner[best], minlength=len(shares)).tolist()


def weight_of(hook: LowRank | LowRankEmbedding, module: nn.Module, init: str) -> Tensor:
    """Return the float32 (or wider) weight (out, in) of the outputs a hook acts on; of an embedding (D, V).

    Raises:
        ModelError: it is quantized.
    """
    weight: Any = module.weight
    if not weight.is_floating_point() or hasattr(weight, "quant_state"):
        raise ModelError(f"init: {init} starts from a decomposition of the weight; it needs one that is not quantized")
    full = low_rank.wide(weight.detach())
    if isinstance(hook, LowRankEmbedding) or low_rank.is_transposed(module):
        full = full.t()
    if isinstance(hook, LowRank) and hook.rows is not None:
        full = full[hook.rows]
    return full


def _enough_ranks(r: int, rows: int, columns: int, init: str) -> None:
    # LoRA-GA takes two singular vectors a rank; EVA's directions are as many as inputs.
    most = columns if init == "eva" else min(rows, columns) // (2 if init == "lora_ga" else 1)
    if r > most:
        raise ModelError(
            f"init: {init} takes its ranks from the weight, which is {rows} x {columns}: r can be {most} at most, got {r}"
        )


def _orthogonal(hook: LowRank) -> None:
    r, device = hook.A.shape[0], hook.A.device
    if r % 2:
        raise ModelError(f"init: orthogonal needs an even rank, got {r}")
    q = torch.linalg.qr(torch.randn(r, r, device=device))[0]
    even, odd = q[0::2], q[1::2]
    # A's rows live in the span of `even`, B's in that of `odd`: their product is zero although neither factor is.
    hook.A.copy_((torch.randn(hook.A.shape[1], r // 2, device=device) @ even).t() / 10)
    hook.B.copy_(torch.randn(hook.B.shape[0], r // 2, device=device) @ odd / 10)
