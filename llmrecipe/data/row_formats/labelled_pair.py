"""Data format: two texts and their label."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.cells import filled_text, label_of, number_of, pair_names
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row
from llmrecipe.data.formats.label_words import label_question


@register
class LabelledPair(DataFormat):
    """Two texts and their label."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("text_a", "text_b", "label"),
        ("sentence1", "sentence2", "label"),
        ("premise", "hypothesis", "label"),
        ("question1", "question2", "label"),
        ("text_a", "text_b", "score"),
        ("sentence1", "sentence2", "score"),
        ("premise", "hypothesis", "score"),
        ("question1", "question2", "score"),
    )
    becomes: ClassVar[dict[str, int]] = {"labelled": 20, "choices": 91}
    example: ClassVar[str] = '{"premise": "It snows.", "hypothesis": "It is cold.", "label": "entailment"}'

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return both texts with their label, or as a row of choices the question whose answer is the word of the label."""
        if conversion.rows == "choices":
            return [label_question(row, conversion)]
        first, second = pair_names(row)
        value = label_of(row) if "label" in row else number_of(row, "score")
        return [{"text": filled_text(row, first), "text_b": filled_text(row, second), "label": value}]
