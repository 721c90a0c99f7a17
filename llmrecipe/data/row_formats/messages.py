"""Data format: a list of {role, content}."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.conversations import from_messages
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row
from llmrecipe.data.formats.messages import has_senders


@register
class Messages(DataFormat):
    """A list of {role, content}.

    An assistant message may have a `weight`, a number from 0 up: how much its tokens count in the loss of `sft`.
    """

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("messages",), ("conversations",))
    becomes: ClassVar[dict[str, int]] = {"dialogue": 10, "prompt": 10}
    example: ClassVar[str] = (
        '{"messages": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]}'
    )

    def fits(self, row: Row) -> bool:
        """Distinguish a list of {role, content} from one of {from, value}."""
        return not has_senders(row)

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the conversation, or its prompt."""
        return from_messages(row, conversion)
