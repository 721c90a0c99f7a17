"""Data format: a conversation whose last turn is liked or not."""

from __future__ import annotations

from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.formats.bad_row import BadRow
from llmrecipe.data.formats.cells import is_judged, liked
from llmrecipe.data.formats.conversations import from_messages
from llmrecipe.data.formats.data_format import Conversion, DataFormat, Row


@register
class UnpairedMessages(DataFormat):
    """A conversation whose last turn is liked or not."""

    columns: ClassVar[tuple[tuple[str, ...], ...]] = (("messages", "label"), ("conversations", "label"))
    becomes: ClassVar[dict[str, int]] = {"unpaired": 20}
    example: ClassVar[str] = (
        '{"messages": [{"role": "user", "content": "A colour?"}, {"role": "assistant", "content": "Blue."}], "label": true}'
    )

    def claims(self, row: Row) -> bool:
        """Claim rows with a true or false: an answer that is disliked must not be learned."""
        return is_judged(row, self)

    def convert(self, row: Row, conversion: Conversion) -> list[Row]:
        """Return the last turn as the answer that is judged, the others as its prompt."""
        (talk,) = from_messages(row, conversion)
        *prompt, answer = talk.pop("messages")
        if answer["role"] != "assistant" or not prompt:
            raise BadRow("the conversation does not end with an answer to judge")
        return [{"prompt": prompt, "completion": [answer], "label": liked(row), **talk}]
