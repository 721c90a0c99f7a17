"""Data format: plain text."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.cells import filled_text
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row


@register
class Text(DataFormat):
    """Plain text."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("text",),)
    becomes: ClassVar[dict[str, int]] = {"text": 10, "dialogue": 60}
    example: ClassVar[str] = '{"text": "Snow fell on the harbour."}'

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the text."""
        return [{"text": filled_text(row, "text")}]
