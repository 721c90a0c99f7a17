"""Data format: a prompt, a better and a worse answer."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row
from llmrecipe.data.formats.preference_pairs import from_preference


@register
class Preference(DataFormat):
    """A prompt, a better and a worse answer."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("prompt", "chosen", "rejected"),)
    becomes: ClassVar[dict[str, int]] = {"preference": 10, "unpaired": 40, "choices": 20}
    example: ClassVar[str] = '{"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven."}'

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the pair, or its two answers as rows or choices of their own."""
        return from_preference(row, conversion)
