"""Data format: texts, some of them marked as outliers."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.cells import filled_text
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row


@register
class Outliers(DataFormat):
    """A text, and whether it is an outlier among the texts of its set."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("text", "outlier"),)
    becomes: ClassVar[dict[str, int]] = {"structured_text": 5}
    example: ClassVar[str] = '{"text": "Snow the fell harbour on.", "outlier": true}'

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the text and the mark; no mark where it is not known."""
        mark = row["outlier"]
        if mark is not None and not isinstance(mark, bool):
            raise BadRow("outlier is neither true nor false", repr(mark)[:60])
        return [{"text": filled_text(row, "text"), "outlier": mark}]
