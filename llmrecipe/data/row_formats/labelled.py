"""Data format: a text and its label."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.cells import filled_text, label_of
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row
from llmrecipe.data.formats.label_words import label_question


@register
class Labelled(DataFormat):
    """A text and its label."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("text", "label"),)
    becomes: ClassVar[dict[str, int]] = {"labelled": 10, "choices": 90}
    example: ClassVar[str] = '{"text": "A fine harbour.", "label": "good"}'

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return text and label, or as a row of choices the question whose answer is the word of the label."""
        if conversion.rows == "choices":
            return [label_question(row, conversion)]
        return [{"text": filled_text(row, "text"), "label": label_of(row)}]
