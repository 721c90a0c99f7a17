"""Merge method: cat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from llmrecipe.core.registry import register
from llmrecipe.interop.merge_method import MergeMethod, Weighted
from llmrecipe.interop.peft.layout import Branch, concatenate_branches


@register
class Cat(MergeMethod):
    """Exact weighted sum, at the sum of the ranks.

    w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2 = [w_1 s_1 B_1, w_2 s_2 B_2] [A_1; A_2]; biases of branches are added as well.
    """

    def combine(self, parts: Sequence[Weighted], generator: torch.Generator) -> list[Branch]:
        """Return the branches of each weight laid side by side."""
        return concatenate_branches([replace(branch, scale=branch.scale * weight) for branch, weight in parts])
