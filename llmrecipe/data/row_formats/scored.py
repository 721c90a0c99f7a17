"""Data format: a text and a number."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.cells import filled_text, number_of
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row


@register
class Scored(DataFormat):
    """A text and a number."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("text", "score"),)
    becomes: ClassVar[dict[str, int]] = {"scored": 5}
    example: ClassVar[str] = '{"text": "A fine harbour.", "score": 4.5}'

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return text and number."""
        return [{"text": filled_text(row, "text"), "label": number_of(row, "score")}]
