"""Data format: a list of {from, value}."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.conversations import from_messages
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row
from llmrecipe.data.formats.messages import has_senders


@register
class ShareGpt(DataFormat):
    """A list of {from, value}."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("conversations",),)
    becomes: ClassVar[dict[str, int]] = {"dialogue": 20, "prompt": 20}
    example: ClassVar[str] = (
        '{"conversations": [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Blue."}]}'
    )

    def fits(self, row: Row) -> bool:
        """Distinguish a list of {from, value} from one of {role, content}."""
        return has_senders(row)

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the conversation, or its prompt."""
        return from_messages(row, conversion)
