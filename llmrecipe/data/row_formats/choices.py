"""Data format: a prompt, its answer, and the answers to choose from."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.conversations import with_choices
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row


@register
class Choices(DataFormat):
    """A prompt, its answer, and the answers to choose from."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("prompt", "completion", "options"), ("prompt", "completion"))
    becomes: ClassVar[dict[str, int]] = {"choices": 10}
    example: ClassVar[str] = '{"prompt": "Which is a colour?", "completion": "Blue.", "options": ["Blue.", "Seven."]}'

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the right answer and the other options, each once; a row without options has one choice."""
        return [with_choices(row, conversion)]
