"""Loss mask: assistant turns."""

from __future__ import annotations

from collections.abc import Sequence

from llmrecipe.core.registry import register
from llmrecipe.data.tokenize.loss_mask import Encoded, LossMask, Span


@register
class Assistant(LossMask):
    """Every assistant turn, of the completion where there is a prompt."""

    def spans(self, encoded: Encoded) -> Sequence[Span]:
        """Return every turn."""
        return encoded.turns
