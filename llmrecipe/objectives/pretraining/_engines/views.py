"""Pictures and feature files as vectors of a sequence, and the views of a row that an evaluation compares.

A view is a row with its own features, without them, or with those of another row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from llmrecipe.data.collate import FeatureVectors

if TYPE_CHECKING:
    from llmrecipe.data.prepare import Rows

OWN, REMOVED, SHUFFLED = "own", "removed", "shuffled"
VIEWS = (OWN, REMOVED, SHUFFLED)
VIEW = "view"
"""Key of an evaluated row's view."""


def vectors_of(array: torch.Tensor, patch: int) -> FeatureVectors:
    """Return the vectors of a picture (C, H, W), cut into patches row by row, or of vectors (m, W), with their places.

    Examples:
        >>> vectors_of(torch.arange(8.0).view(1, 2, 4), patch=2).values.tolist()
        [[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]
    """
    if array.dim() == 2:
        count = torch.arange(len(array))
        return FeatureVectors(array, torch.stack((count, torch.zeros_like(count)), 1))
    cut = array.unflatten(1, (-1, patch)).unflatten(3, (-1, patch))
    rows, columns = cut.shape[1], cut.shape[3]
    values = cut.permute(1, 3, 0, 2, 4).reshape(rows * columns, -1)
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return FeatureVectors(values, grid)


def views_of(data: Rows, index: int) -> Iterator[dict[str, Any]]:
    """Yield the views of a row of a split; the other row's picture is half the split away, or the next that differs."""
    row = data[index]
    yield {**row, VIEW: OWN}
    yield {**{k: v for k, v in row.items() if k != "features"}, VIEW: REMOVED}
    count = len(data)
    for step in range(count):
        other = data[(index + max(count // 2, 1) + step) % count]["features"]
        if other.key != row["features"].key:
            yield {**row, "features": other, VIEW: SHUFFLED}
            return
