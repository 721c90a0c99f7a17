"""Loss mask: everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.tokenize.loss_mask import Encoded, LossMask, Span


@register
class All(LossMask):
    """Every token, the prompt's too."""

    reads_turns: ClassVar[bool] = False

    def spans(self, encoded: Encoded) -> Sequence[Span]:
        """Return the whole sequence."""
        return [(0, len(encoded.ids))]
