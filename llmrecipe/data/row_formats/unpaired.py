"""Data format: a prompt, an answer, liked or not."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.cells import is_judged, liked
from llmrecipe.data.formats.conversations import prompt_answers
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row


@register
class Unpaired(DataFormat):
    """A prompt, an answer, liked or not."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("prompt", "completion", "label"),)
    becomes: ClassVar[dict[str, int]] = {"unpaired": 10}
    example: ClassVar[str] = '{"prompt": "Name a colour.", "completion": "Blue.", "label": true}'

    def claims(self, row: Row) -> bool:
        """Claim rows with a true or false: an answer that is disliked must not be learned."""
        return is_judged(row, self)

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return prompt, answer and label."""
        return [{**prompt_answers(row, ("completion",), conversion), "label": liked(row)}]
