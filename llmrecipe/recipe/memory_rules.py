"""Keys of memory that undo one another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmrecipe.recipe.schema import Recipe


def memory_mistakes(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (key, what is wrong) for feed-forward layers in chunks whose products are to be kept."""
    form = recipe.model.gradient_checkpointing
    if recipe.runtime.ffn_rows is not None and form == "selective":
        yield (
            ("runtime", "ffn_rows"),
            "chunks of a feed-forward layer are computed again, and model.gradient_checkpointing=selective keeps what they "
            "compute; leave it out, or set model.gradient_checkpointing to true or offload",
        )
