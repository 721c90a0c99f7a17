"""Loss mask: the last assistant turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.tokenize.loss_mask import Encoded, LossMask, Span


@register
class Last(LossMask):
    """The last assistant turn."""

    last_only: ClassVar[bool] = True

    def spans(self, encoded: Encoded) -> Sequence[Span]:
        """Return the last turn."""
        return encoded.turns[-1:]
