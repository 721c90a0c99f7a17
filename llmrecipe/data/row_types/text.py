"""Row type: documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.row_type import RowType
from llmrecipe.data.tokenize.sequences import encode_sequences


@register
class Text(RowType):
    """Documents: every token but the first is a target.

    Canonical row: text, or input_ids (+ labels). Token row: ids, trained, and of raw text the bytes and words its targets
    stand for.
    """

    lists: ClassVar[tuple[str, ...]] = ("ids",)
    masks: ClassVar[tuple[str, ...]] = ("trained",)
    scalars: ClassVar[tuple[tuple[str, str], ...]] = (("bytes", "int64"), ("words", "int64"))

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Encode each row as one sequence."""
        encode_sequences(encoder, items, report, measured=True)
