"""Data format: a prompt and its answer."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.conversations import right_answers
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row


@register
class PromptCompletion(DataFormat):
    """A prompt and its answer.

    `completion` may be a list of right answers: the first is trained, and a generated answer is scored against all of them.
    """

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("prompt", "completion"),)
    becomes: ClassVar[dict[str, int]] = {"dialogue": 30}
    example: ClassVar[str] = '{"prompt": "Name a colour.", "completion": "Blue."}'

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return prompt and answer, all text or all messages."""
        return [right_answers(row, row["completion"], conversion)]
