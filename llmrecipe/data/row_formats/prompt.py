"""Data format: a prompt; other columns are kept."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.conversations import prompt_answers
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row


@register
class Prompt(DataFormat):
    """A prompt; other columns are kept."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("prompt",),)
    becomes: ClassVar[dict[str, int]] = {"prompt": 50}
    example: ClassVar[str] = '{"prompt": "Name a colour.", "answer": "Blue."}'

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the prompt with the other columns."""
        rest = {k: v for k, v in row.items() if k not in ("prompt", "tools", "chat_template_kwargs")}
        return [{**prompt_answers(row, (), conversion), "columns": rest}]
