"""One tensor of the base, and what is selected of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from llmrecipe.methods.selective._engines.sparse_kernels import Layout


@dataclass(frozen=True)
class Weight:
    """A tensor of the base with every module that uses it (two for tied embeddings)."""

    name: str
    shape: tuple[int, ...]
    """Logical shape, also where the storage is packed."""
    owners: tuple[tuple[nn.Module, str], ...]
    quantized: bool

    @property
    def numel(self) -> int:
        """Return how many numbers it has."""
        return math.prod(self.shape)

    @property
    def value(self) -> Tensor:
        """Return the stored tensor."""
        module, tensor = self.owners[0]
        return getattr(module, tensor)


@dataclass(frozen=True)
class Selected:
    """What is selected of one tensor."""

    idx: Tensor
    """Sorted: flat indices of entries, or indices of rows, columns or blocks of the stored tensor."""
    layout: Layout = "entries"
    base: str = ""
    """Digest of the base's numbers there, where a saved selection knows it."""
    place: int | None = None
    """Its place among the selections of the tensor, where a saved one knows it; None comes last."""


def is_conv1d(module: nn.Module) -> bool:
    """Return whether the weight is stored (in, out), as GPT-2 does."""
    return type(module).__name__ == "Conv1D"
