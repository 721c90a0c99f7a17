"""Anchors with their positives, and all texts of a step as candidates of each of them.

Letters: B rows, C hard negatives, A anchors, M candidates, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmrecipe.engine.role_models import Roles
from llmrecipe.objectives.pretraining._engines import contrast
from llmrecipe.objectives.pretraining._engines.embedding_metrics import BLOCK, ranks


@dataclass(frozen=True)
class Candidates:
    """Vectors that anchors are compared with, and anchors that positives are compared with in the other direction."""

    bc: Tensor
    """(M, D) all positives, then all hard negatives."""
    keys_bc: Tensor
    """(M,) digests of their texts."""
    first: int
    """Place of the own first row."""
    first_hard: int
    """Place of the own first hard negative."""
    a: Tensor | None = None
    """(B', D) all anchors, and the digests of their texts, where both directions are compared."""
    keys_a: Tensor | None = None


@dataclass(frozen=True)
class Vectors:
    """The vectors of this process's rows."""

    a: Tensor
    """(B, D) anchors."""
    b: Tensor
    """(B, D) their positives."""
    c: Tensor
    """(C, D) hard negatives of some of the rows."""
    keys: Tensor
    """(2 B + C,) digests of the texts of a, b and c."""
    hard: Tensor
    """(C,) row of each hard negative."""
    paired: Tensor
    """(B,) whether a and b are meant to be alike, so that the row is an anchor."""

    @property
    def keys_a(self) -> Tensor:
        """Return the digests of the anchors, (B,)."""
        return self.keys[: len(self.a)]

    @property
    def keys_b(self) -> Tensor:
        """Return the digests of the positives, (B,)."""
        return self.keys[len(self.a) : 2 * len(self.a)]

    def blocks(self) -> list[Tensor]:
        """Return the rows that are anchors, in parts whose tables fit in memory."""
        return list(self.paired.nonzero().squeeze(-1).split(BLOCK))

    def joined(self, roles: Roles | None, both: bool) -> Candidates:
        """Return the candidates of all processes; the own ones without `roles`.

        Args:
            both: the anchors too.
        """

        def everywhere(values: Tensor) -> tuple[Tensor, int]:
            return (values, 0) if roles is None else roles.gather_rows(values)

        (b, first), (c, first_hard) = everywhere(self.b), everywhere(self.c)
        keys_b, keys_c = everywhere(self.keys_b)[0], everywhere(self.keys[2 * len(self.a) :])[0]
        a, keys_a = (everywhere(self.a)[0], everywhere(self.keys_a)[0]) if both else (None, None)
        return Candidates(torch.cat((b, c)), torch.cat((keys_b, keys_c)), first, len(b) + first_hard, a, keys_a)


@dataclass(frozen=True)
class Comparison:
    """How anchors and candidates are compared: options of the objective."""

    loss_type: str
    margin: float
    distance: str
    mining: str
    temperature: float
    hard_negative_weight: float


@dataclass(frozen=True)
class ComparedAnchors:
    """Anchors among their candidates."""

    losses: Tensor
    """(A,)"""
    nearness: Tensor
    """(A, M), larger is nearer."""
    own: Tensor
    """(A,) column of each anchor's positive."""
    barred: Tensor
    """(A, M) candidates that are no negatives."""

    def ranks(self) -> Tensor:
        """Return the rank (A,) of each anchor's positive."""
        return ranks(self.nearness.detach(), self.own, self.barred)


def compare(v: Vectors, others: Candidates, chosen: Tensor, how: Comparison) -> ComparedAnchors:
    """Return losses and nearness of the chosen anchors, (A,) indices of rows, among all candidates."""
    own = others.first + chosen
    a, keys_a, keys_b = v.a[chosen], v.keys_a[chosen], v.keys_b[chosen]
    barred = contrast.barred_candidates(keys_a, keys_b, others.keys_bc, own)
    if how.loss_type == "triplet":
        table = contrast.distance_table(a, others.bc, how.distance)
        return ComparedAnchors(contrast.mined_triplet(table, own, barred, how.margin, how.mining), -table, own, barred)
    logits = a @ others.bc.T / how.temperature
    weighted = logits
    if how.hard_negative_weight:
        places = torch.full_like(v.paired, -1, dtype=torch.long).index_copy(0, chosen, torch.arange(len(chosen)).to(chosen))
        rows = places[v.hard]
        columns = others.first_hard + torch.arange(len(v.hard), device=rows.device)
        more = torch.full_like(columns[rows >= 0], how.hard_negative_weight, dtype=logits.dtype)
        weighted = logits.index_put((rows[rows >= 0], columns[rows >= 0]), more, accumulate=True)
    losses = contrast.infonce(weighted, own, barred)
    if others.a is not None and others.keys_a is not None:
        back = contrast.barred_candidates(keys_b, keys_a, others.keys_a, own)
        losses = (losses + contrast.infonce(v.b[chosen] @ others.a.T / how.temperature, own, back)) / 2.0
    return ComparedAnchors(losses, logits, own, barred)
