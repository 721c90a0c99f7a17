"""Data format: two texts, with a score or label if any."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.cells import filled_text, label_of, number_of, pair_names
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row


@register
class Pairs(DataFormat):
    """Two texts, with a score or label if any."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("text_a", "text_b"),
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("question1", "question2"),
        ("anchor", "positive"),
    )
    optional: ClassVar[tuple[str, ...]] = ("score",)
    becomes: ClassVar[dict[str, int]] = {"pairs": 20}
    example: ClassVar[str] = '{"sentence1": "It snows.", "sentence2": "Snow falls.", "score": 4.5}'

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return both texts with their score and label."""
        names = ("anchor", "positive") if "anchor" in row else pair_names(row)
        score = None if row.get("score") is None else number_of(row, "score")
        label = label_of(row) if row.get("label") is not None else None
        return [{"texts": [filled_text(row, n) for n in names], "score": score, "label": label}]
