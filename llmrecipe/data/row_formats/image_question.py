"""Data format: a picture, or features of something else, with a question and its answer."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.cells import filled_text
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row
from llmrecipe.data.formats.feature_cells import feature_file


@register
class ImageQuestion(DataFormat):
    """A picture, or a file of features (audio frames, video clips, regions), a question about it, and the answer."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("image", "question", "answer"), ("features", "question", "answer"))
    becomes: ClassVar[dict[str, int]] = {"pictured_questions": 10}
    example: ClassVar[str] = '{"image": "pictures/harbour.png", "question": "Does it snow?", "answer": "yes"}'

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the path of the file, whose bytes are stored where the row contains them, the question, and the answer."""
        question, answer = filled_text(row, "question"), filled_text(row, "answer")
        return [{"features": feature_file(row, conversion), "text": question, "label": answer}]
