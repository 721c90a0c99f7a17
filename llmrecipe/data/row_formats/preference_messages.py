"""Data format: a conversation, a better and a worse answer to it."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.conversations import conversation_of
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row
from llmrecipe.data.formats.preference_pairs import answers_alone, paired


@register
class PreferenceMessages(DataFormat):
    """A conversation that ends before the answer, a better and a worse answer to it."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("messages", "chosen", "rejected"),
        ("conversations", "chosen", "rejected"),
    )
    becomes: ClassVar[dict[str, int]] = {"preference": 12, "unpaired": 42, "choices": 22}
    example: ClassVar[str] = (
        '{"messages": [{"role": "user", "content": "Name a colour."}], "chosen": "Blue.", "rejected": "Seven."}'
    )

    def fits(self, row: Row) -> bool:
        """Leave rows whose answers hold the conversation themselves to the format of those."""
        return answers_alone(row)

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the pair with the conversation as its prompt."""
        column, messages = conversation_of(row)
        if messages[-1]["role"] == "assistant":
            raise BadRow(f"'{column}' ends with an answer of its own, before those that are compared")
        return paired({**row, "prompt": messages}, row, conversion)
