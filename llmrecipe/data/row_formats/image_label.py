"""Data format: a picture and its label."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.cells import label_of
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row
from llmrecipe.data.formats.feature_cells import feature_file


@register
class ImageLabel(DataFormat):
    """A picture and its label."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("image", "label"),)
    becomes: ClassVar[dict[str, int]] = {"labelled_images": 10}
    example: ClassVar[str] = '{"image": "pictures/harbour.png", "label": "harbour"}'

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the path of the picture, whose bytes are stored where the row contains them, and the label."""
        return [{"features": feature_file(row, conversion), "label": label_of(row)}]
