"""The interface of a merge method: how the changes that several adapters make to one base become one change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor

from llmrecipe.core.errors import ModelError
from llmrecipe.core.option_types import Literal, PositiveFraction
from llmrecipe.core.registry import CONFIG, name_of, options
from llmrecipe.interop.peft.layout import Branch

Weighted = tuple[Branch, float]
"""A change s B A of one weight, and its weight in the merger."""


@pydantic_dataclass(config=CONFIG, kw_only=True)
class MergeMethod:
    """One way to merge adapters."""

    group: ClassVar[str] = "merge_method"
    on: ClassVar[str] = "factors"
    """What `merge` is given: `factors` (all A, then all B, of equal ranks), or `changes` (s B A, of any ranks)."""

    def merge(self, tensors: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        """Return the merger of tensors of one shape.

        Args:
            weights: one a tensor; any sign.
            generator: for every random draw.
        """
        raise NotImplementedError

    def combine(self, parts: Sequence[Weighted], generator: torch.Generator) -> list[Branch]:
        """Return one branch for each weight; adapters that leave a weight alone take no part in it.

        Raises:
            ModelError: a branch has a bias, or factors of different ranks are to be merged.
        """
        name = name_of(type(self))
        if biased := next((b.path for b, _ in parts if b.bias is not None), None):
            raise ModelError(f"--combine {name}: {biased} has a bias in its branch (lora_bias); only --combine cat adds those")
        groups: dict[tuple[str, str], list[Weighted]] = {}
        for branch, weight in parts:
            groups.setdefault(branch.key, []).append((branch, weight))
        one = self._changes if self.on == "changes" else self._factors
        return [one(group, generator) for group in groups.values()]

    def _changes(self, group: Sequence[Weighted], generator: torch.Generator) -> Branch:
        """Return the best approximation (U S)[:, :r] V[:r] of the merged changes at the largest rank of the group."""
        change = self.merge([b.scale * (b.B @ b.A) for b, _ in group], [w for _, w in group], generator)
        r = max(b.r for b, _ in group)
        U, S, V = torch.linalg.svd(change.float(), full_matrices=False)
        A, B = V[..., :r, :].contiguous(), (U * S[..., None, :])[..., :r].contiguous()
        return replace(group[0][0], A=A, B=B, scale=1.0)

    def _factors(self, group: Sequence[Weighted], generator: torch.Generator) -> Branch:
        """Return (merged B)(merged A) with weights sqrt(|w s|) on both sides and the sign of w s on A."""
        first = group[0][0]
        if len({b.r for b, _ in group}) > 1:
            ranks = ", ".join(str(b.r) for b, _ in group)
            raise ModelError(
                f"--combine {name_of(type(self))}: {first.path} has ranks {ranks}; equal ranks are needed, "
                "--combine cat and svd take any"
            )
        roots = [abs(b.scale * w) ** 0.5 for b, w in group]
        # The sign stands on one side: on both it would cancel.
        signed = [root if b.scale * w >= 0 else -root for (b, w), root in zip(group, roots, strict=True)]
        A = self.merge([b.A for b, _ in group], signed, generator)
        return replace(first, A=A, B=self.merge([b.B for b, _ in group], roots, generator), scale=1.0)


@options
class Density:
    """Option of the methods that keep a share of the entries."""

    density: PositiveFraction
    """Share of the entries that is kept."""


@options
class Sign:
    """Option of the methods that elect a sign."""

    sign: Literal["total", "frequency"] = "total"
    """How a sign is elected: by the sum of the entries, or by the number of tensors that have it."""
