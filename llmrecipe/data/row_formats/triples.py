"""Data format: an anchor, a match and a mismatch."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.cells import filled_text
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row


@register
class Triples(DataFormat):
    """An anchor, a match and a mismatch."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("anchor", "positive", "negative"),)
    becomes: ClassVar[dict[str, int]] = {"pairs": 10}
    example: ClassVar[str] = '{"anchor": "How cold is it?", "positive": "It is minus two.", "negative": "It is noon."}'

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the three texts."""
        return [{"texts": [filled_text(row, n) for n in ("anchor", "positive", "negative")], "score": None, "label": None}]
