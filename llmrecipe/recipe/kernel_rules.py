"""Keys that say twice how the small operations of a block become few."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmrecipe.recipe.schema import Recipe


def kernel_mistakes(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (key, what is wrong) for kernels of a package inside blocks that are compiled."""
    if recipe.model.kernels == "liger" and recipe.model.compile == "blocks":
        yield (
            ("model", "kernels"),
            "liger is for blocks that are not compiled, and model.compile=blocks fuses their operations itself; leave one of "
            "the two out",
        )
