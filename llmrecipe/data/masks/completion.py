"""Loss mask: what follows the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.tokenize.loss_mask import Encoded, LossMask, Span


@register
class Completion(LossMask):
    """The tokens after the prompt; in a conversation without a separate prompt, every assistant turn."""

    turns_of_prompted: ClassVar[bool] = False

    def spans(self, encoded: Encoded) -> Sequence[Span]:
        """Return everything after the prompt, or the turns where there is none."""
        return encoded.turns if encoded.answer is None else [(encoded.answer, len(encoded.ids))]
