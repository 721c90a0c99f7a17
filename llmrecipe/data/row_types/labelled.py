"""Row type: texts with labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.labelled_rows import encode_labelled
from llmrecipe.data.tokenize.row_type import RowType


@register
class Labelled(RowType):
    """A text, or two joined as the tokenizer does, with a label.

    Canonical row: text (+ text_b), label. Token row: ids (+ type_ids), label (JSON text).
    """

    lists: ClassVar[tuple[str, ...]] = ("ids", "type_ids")
    scalars: ClassVar[tuple[tuple[str, str], ...]] = (("label", "string"),)
    uncounted: ClassVar[tuple[str, ...]] = ("type_ids",)
    numbered: ClassVar[bool] = True

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Encode raw text with the special tokens the tokenizer adds."""
        encode_labelled(encoder, items, report)
