"""Data format: a picture and its text."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.cache import keep_picture
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.cells import filled_text
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row


@register
class ImageText(DataFormat):
    """A picture and its text."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("image", "text"),)
    becomes: ClassVar[dict[str, int]] = {"multimodal": 10}
    example: ClassVar[str] = '{"image": "pictures/harbour.png", "text": "A harbour in snow."}'

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the path of the picture, whose bytes are stored where the row contains them, and the text."""
        image = row["image"]
        if isinstance(image, dict):
            if image.get("bytes"):
                return [{"image": str(keep_picture(image["bytes"])), "text": filled_text(row, "text")}]
            image = image.get("path")
        if not isinstance(image, str) or not image:
            raise BadRow("'image' is not a path", f"{image!r:.80}")
        if conversion.base is None:
            raise BadRow("'image' is a path, and these rows are in no folder", f"{image!r:.80}")
        path = conversion.base / image
        if not path.resolve().is_relative_to(conversion.base.resolve()):
            raise BadRow("the image file is outside of the folder of its rows", f"{image!r:.80}")
        if not path.is_file():
            raise BadRow("the image file does not exist", str(path))
        return [{"image": str(path.resolve()), "text": filled_text(row, "text")}]
