"""Row type: texts with a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.labelled_rows import encode_scored
from llmrecipe.data.tokenize.row_type import RowType


@register
class Scored(RowType):
    """A text, or two joined as the tokenizer does, with a number.

    Canonical row: text (+ text_b), label (a number). Token row: ids (+ type_ids), score.
    """

    lists: ClassVar[tuple[str, ...]] = ("ids", "type_ids")
    scalars: ClassVar[tuple[tuple[str, str], ...]] = (("score", "float64"),)
    uncounted: ClassVar[tuple[str, ...]] = ("type_ids",)
    takes: ClassVar[dict[str, int]] = {"labelled": 10, "labelled_pair": 20}

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Encode raw text with the special tokens the tokenizer adds."""
        encode_scored(encoder, items, report)
