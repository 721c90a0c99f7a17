"""Data format: a picture, or features of something else, and its text."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.cells import filled_text
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row
from llmrecipe.data.formats.feature_cells import feature_file


@register
class ImageText(DataFormat):
    """A picture, or a file of features (audio frames, video clips, regions), and its text; `attributes` are words of it."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("image", "text"), ("features", "text"))
    optional: ClassVar[tuple[str, ...]] = ("attributes",)
    becomes: ClassVar[dict[str, int]] = {"multimodal": 10, "pictured_words": 10}
    example: ClassVar[str] = '{"image": "pictures/harbour.png", "text": "A harbour in snow."}'

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the path of the file, whose bytes are stored where the row contains them, the text and its attributes."""
        made: Row = {"features": feature_file(row, conversion), "text": filled_text(row, "text")}
        if row.get("attributes") is not None:
            made["attributes"] = _words(row["attributes"], made["text"])
        return [made]


def _words(cell: object, text: str) -> list[str]:
    words = [cell] if isinstance(cell, str) else cell
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise BadRow("'attributes' is no list of words", f"{cell!r:.80}")
    missing = next((word for word in words if word not in text), None)
    if missing is not None:
        raise BadRow("'attributes' names a word that is not in the text", f"{missing!r:.80}")
    return words
