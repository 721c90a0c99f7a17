"""Row type: passages with questions that spans of them answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.passage_rows import encode_passages
from llmrecipe.data.tokenize.row_type import RowType


@register
class Passages(RowType):
    """A question and its passage, joined as the tokenizer joins two texts, in windows that overlap where it is too long.

    Canonical row: question, context, answers (texts, and where each begins; none where there is no answer). Token row: ids of
    all windows one after another (+ type_ids), windows (the length of each), begins and ends (the characters of the passage
    that each token stands for, -1 for none), starts and stops (the first and the last token of the first answer in each
    window), nulls (the token that stands for no answer: cls, or the last one; starts and stops of a window without the whole
    answer), answers (JSON text), context.
    """

    lists: ClassVar[tuple[str, ...]] = ("ids", "type_ids", "windows", "begins", "ends", "starts", "stops", "nulls")
    scalars: ClassVar[tuple[tuple[str, str], ...]] = (("answers", "string"), ("context", "string"))
    uncounted: ClassVar[tuple[str, ...]] = ("type_ids", "windows", "begins", "ends", "starts", "stops", "nulls")
    windowed: ClassVar[bool] = True

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Encode each question with its passage; windows of at most `data.max_length` tokens move on by `data.stride`."""
        encode_passages(encoder, items, report)
