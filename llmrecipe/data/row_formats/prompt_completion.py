"""Data format: a prompt and its answer."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.conversations import prompt_answers
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row


@register
class PromptCompletion(DataFormat):
    """A prompt and its answer."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("prompt", "completion"),)
    becomes: ClassVar[dict[str, int]] = {"dialogue": 30}
    example: ClassVar[str] = '{"prompt": "Name a colour.", "completion": "Blue."}'

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return prompt and answer, all text or all messages."""
        return [prompt_answers(row, ("completion",), conversion)]
