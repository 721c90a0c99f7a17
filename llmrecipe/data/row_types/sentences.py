"""Row type: documents cut into sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from llmrecipe.core.registry import register
from llmrecipe.data.token_report import Report
from llmrecipe.data.tokenize.encoder import Encoder, Item
from llmrecipe.data.tokenize.row_type import RowType
from llmrecipe.data.tokenize.word_rows import encode_sentences


@register
class Sentences(RowType):
    """Documents with the lengths of their sentences and the word of each token, for objectives on pairs of sentences.

    Canonical row: text; a sentence ends at a line break, or at `.`, `!`, `?` (also full-width) and what closes a quotation.
    Token row: ids (no special tokens), words (one number per token, -1 for special tokens), sentences (numbers of tokens,
    which add up to all ids). A document may be longer than `data.max_length`, which bounds the pairs made of it.
    """

    lists: ClassVar[tuple[str, ...]] = ("ids", "words", "sentences")
    uncounted: ClassVar[tuple[str, ...]] = ("words", "sentences")
    takes: ClassVar[dict[str, int]] = {"text": 10}

    def encode(self, encoder: Encoder, items: Sequence[Item], report: Report) -> None:
        """Encode each document."""
        encode_sentences(encoder, items, report)
