"""VeRA."""

from __future__ import annotations

import hashlib
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrecipe.core.errors import ModelError
from llmrecipe.core.option_types import NonNegativeInt, OpenFraction, PositiveFloat, Rank
from llmrecipe.core.registry import register
from llmrecipe.methods._base.method import Stage, Wrapper
from llmrecipe.methods._engines import low_rank
from llmrecipe.models.hooks.hook import DELTA, Hook, device_of, row_index
from llmrecipe.models.hooks.host import add_hook, merge_hooks
from llmrecipe.models.hooks.shared_module import SharedModule, add_shared, shared_modules
from llmrecipe.models.module_map import anatomy


def kaiming(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return U(-sqrt(6 / n), sqrt(6 / n)) of a shape (m, n), drawn on the CPU."""
    bound = math.sqrt(6.0 / shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class Projections(SharedModule):
    """The frozen pair A (r, in) and B (out, r) of the widest site; narrower sites use the first columns and rows.

    Both follow from the seed, so no delta stores them.
    """

    A: Tensor
    B: Tensor

    def __init__(self, r: int, width_in: int, width_out: int, seed: int):
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(seed)
        self.register_buffer("A", kaiming((r, width_in), generator), persistent=False)
        self.register_buffer("B", kaiming((width_out, r), generator), persistent=False)

    def digest(self) -> str:
        """Return 16 hex digits that stand for the values."""
        values = b"".join(t.detach().float().cpu().numpy().tobytes() for t in (self.A, self.B))
        return hashlib.sha256(values).hexdigest()[:16]


class ScaledProjection(Hook):
    """y + b * (B (d * (A x))) with frozen A and B.

    B is scaled rather than the output, so that the backward pass keeps r numbers a token and nothing of width in or out.
    """

    order = DELTA
    rowwise = True
    rows: Tensor | None

    def __init__(self, shared: Projections, width_in: int, width_out: int, start: float, dropout: float, rows: Tensor | None):
        super().__init__()
        self.lambda_d = nn.Parameter(torch.full((shared.A.shape[0],), start))
        self.lambda_b = nn.Parameter(torch.zeros(width_out))
        self.width_in, self.dropout = width_in, dropout
        # In a list, so that the matrices belong to the model alone and not to every hook.
        self.shared = [shared]
        self.register_buffer("rows", rows, persistent=False)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) of this site."""
        shared = self.shared[0]
        return shared.A[:, : self.width_in], shared.B[: self.lambda_b.shape[0]]

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + b * (B (d * (A dropout(x)))), (..., out)."""
        A, B = self.matrices()
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        h = F.linear(dropped, A.to(x.dtype)) * self.lambda_d.to(x.dtype)
        change = F.linear(h, (self.lambda_b[:, None] * B).to(h.dtype)).to(y.dtype)
        return y + change if self.rows is None else y.index_add(-1, self.rows, change)

    def product(self) -> Tensor:
        """Return diag(b) B diag(d) A in float32, (out, in)."""
        A, B = self.matrices()
        return (self.lambda_b.float()[:, None] * B.float()) @ (self.lambda_d.float()[:, None] * A.float())

    def merge(self, module: nn.Module) -> None:
        """Set W <- W + diag(b) B diag(d) A."""
        low_rank.add_to_weight(module, self.product(), self.rows)


@register
class Vera(Wrapper):
    """VeRA: y = W x + b * (B (d * (A x))); one frozen random pair A (r, in), B (out, r) for all sites, two vectors for each.

    A and B are Kaiming-uniform from `seed`, as large as the widest site; a narrower one uses their first columns and rows.
    b (out) starts at zero, so step 0 is the base model; d (r) starts at `d_initial`. Only b and d train: r + out numbers a
    site. Merging W <- W + diag(b) B diag(d) A is exact up to rounding. A delta holds the vectors and a digest of A and B, which
    are drawn again from the seed and refused where they differ.

    Paper: VeRA: Vector-based Random Matrix Adaptation (arXiv 2310.11454).
    """

    shards: ClassVar[tuple[str, ...]] = ("zero1", "zero2", "zero3")
    stage: ClassVar[Stage] = Stage.INJECT
    mergeable: ClassVar[bool] = True

    target: str = "attn.q|v"
    """Linear sites that are adapted."""
    r: Rank = 256
    """Rank of A and B."""
    d_initial: PositiveFloat = 0.1
    """Initial value of d."""
    dropout: OpenFraction = 0.0
    """Dropout on the input of A while training."""
    seed: NonNegativeInt = 0
    """Seed of A and B."""

    def attach(self, model: nn.Module, structure: dict[str, Any] | None = None) -> None:
        """Draw A and B, and give every site of `target` its two vectors.

        Raises:
            ModelError: a site is not a linear layer, or the seed gives other matrices than those of a saved delta.
        """
        sites = anatomy(model).at(self.target)
        for site in sites:
            if not low_rank.is_linear_site(site):
                raise ModelError(f"stack.{self.name}: {site.path} is not a linear layer; vera adapts linear layers")
        place = device_of(model)
        wide_in, wide_out = max(s.width_in for s in sites), max(s.width_out for s in sites)
        with torch.device("meta" if place.type == "meta" else "cpu"):
            shared = Projections(self.r, wide_in, wide_out, self.seed)
        wanted = (structure or {}).get("projections")
        if wanted is not None and place.type != "meta" and shared.digest() != wanted:
            raise ModelError(
                f"stack.{self.name}: seed {self.seed} gives other matrices A and B here than those the vectors were trained "
                "with (another version of torch); merge the run where it was trained"
            )
        add_shared(model, shared.to(place), self.name)
        for site in sites:
            with torch.device(device_of(site.module)):
                rows = row_index(site)
                hook = ScaledProjection(shared, site.width_in, site.width_out, self.d_initial, self.dropout, rows)
            add_hook(site.module, site.name(self.name), hook, self.name)

    def structure(self, model: nn.Module) -> dict[str, Any]:
        """Return the digest of A and B."""
        shared = self._projections(model)
        return {} if shared.A.is_meta else {"projections": shared.digest()}

    def merge(self, model: nn.Module) -> None:
        """Set W <- W + diag(b) B diag(d) A at every site."""
        merge_hooks(model, self.name)

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Return closed forms: sum of r + out trains; AdamW keeps 8 bytes for each; A and B are r (in + out) once."""
        count = sum(n for _, n in self.describe(model))
        shared = self._projections(model)
        held = 4 * (shared.A.numel() + shared.B.numel())
        return {"trainable": count, "optimizer_bytes": 8 * count, "gradient_bytes": 4 * count, "state_bytes": held}

    def _projections(self, model: nn.Module) -> Projections:
        return next(shared for _, shared in shared_modules(model, self.name) if isinstance(shared, Projections))
