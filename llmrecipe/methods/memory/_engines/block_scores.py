"""Blocks in the order of the forward pass, the parameters of each, and which of them train next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llmrecipe.models.module_map import anatomy
from llmrecipe.models.site import Site


@dataclass(frozen=True)
class BlockOrder:
    """The blocks of a model, those of an encoder first."""

    sites: tuple[Site, ...]
    model: nn.Module

    def __len__(self) -> int:
        return len(self.sites)

    def of(self, layers: str) -> set[int]:
        """Return the places of the blocks that a range of layers names.

        Raises:
            ModelError: it names none.
        """
        named = {site.path for site in anatomy(self.model).at(f"layers.{layers}.block")}
        return {i for i, site in enumerate(self.sites) if site.path in named}


def blocks_of(model: nn.Module) -> BlockOrder:
    """Return the blocks of a model."""
    found = anatomy(model).at("block")
    return BlockOrder(tuple(sorted(found, key=lambda s: (s.side != "encoder", s.layer))), model)


def owners_of(model: nn.Module) -> dict[str, int]:
    """Return parameter name -> its block; -1 for the embedding, without what comes after the blocks (norm, head)."""
    blocks = {f"{site.path}.": i for i, site in enumerate(blocks_of(model).sites)}
    embeds = tuple(f"{s.path}." for s in anatomy(model).sites if s.role.startswith("embed") or s.role == "norm.embed")
    found: dict[str, int] = {}
    for name, _ in model.named_parameters():
        place = next((i for path, i in blocks.items() if name.startswith(path)), None)
        if place is not None:
            found[name] = place
        elif name.startswith(embeds) or any("embed" in part for part in name.split(".")):
            found[name] = -1
    return found


class BlockNorms:
    """Running means of the gradient norm of each block, and the blocks that were chosen last."""

    def __init__(self, decay: float):
        self.decay = decay
        self.mean: list[float] = []
        self.active: list[int] | None = None
        self.seen = 0

    def see(self, model: nn.Module, first: bool = False) -> None:
        """Take in the gradients of a step; a block without any keeps its mean.

        Args:
            first: whether this is part of the first measurement, a plain mean.
        """
        squares: dict[int, torch.Tensor] = {}
        owners = owners_of(model)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and owners.get(name, -1) >= 0:
                square = parameter.grad.detach().double().square().sum()
                squares[owners[name]] = squares.get(owners[name], torch.zeros_like(square)) + square
        self.mean = self.mean or [0.0] * len(blocks_of(model))
        self.seen += 1
        keep = 1.0 - 1.0 / self.seen if first else self.decay
        for block, square in squares.items():
            self.mean[block] = keep * self.mean[block] + (1.0 - keep) * float(square.sqrt())


def active_blocks(
    score: str, count: int, wanted: int, mean: Sequence[float], contiguous: bool, seed: tuple[int, int]
) -> list[int]:
    """Return the blocks that train, ascending.

    Args:
        score: `random`; `grad_norm`, the largest means; or `cost`, the largest means over the blocks that keep activations.
        seed: (seed, step) of `random`.
    """
    if score == "random":
        generator = torch.Generator().manual_seed(seed[0] * 1_000_003 + seed[1])
        drawn = torch.randperm(count - 1, generator=generator)[: wanted - 1].tolist()
        chosen = {count - 1, *drawn}
    else:
        values = [m / (count - i) if score == "cost" else m for i, m in enumerate(mean)]
        # Of equal values the higher block, which keeps fewer activations.
        chosen = set(sorted(range(count), key=lambda i: (-values[i], -i))[:wanted])
    return list(range(min(chosen), count)) if contiguous else sorted(chosen)
