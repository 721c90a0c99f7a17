"""Keys that only packed rows read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmrecipe.recipe.schema import Recipe


def packing_mistakes(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (key, what is wrong) for a route of packed attention in a recipe whose rows are never packed."""
    route = recipe.model.packed_attention
    if route != "auto" and recipe.data.packing == "off":
        yield (
            ("model", "packed_attention"),
            f"{route} is never reached, because data.packing=off packs no rows; leave it at auto, or set data.packing to auto "
            "or on",
        )
